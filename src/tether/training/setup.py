"""What a trainer's constructor asks before and while it loads: arguments, meaning, sources, adapters."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed

from tether.errors import ConfigError
from tether.models.spec import ModelSpec, select_trainable
from tether.models.structure import disable_dropout, transformers_model
from tether.reference.separate import may_move
from tether.scoring.router import has_router
from tether.training.arguments import PreferenceConfig

logger = logging.getLogger("tether")


def check_arguments(
    args: PreferenceConfig | None, wanted: type[PreferenceConfig], train: Any, evaluation: Any
) -> PreferenceConfig:
    if not isinstance(args, wanted):
        came = "nothing" if args is None else f"a {type(args).__name__}"
        raise ConfigError(f"args: {came} came; pass a configuration such as {wanted.__name__}(output_dir=...).")
    if train is None:
        raise ConfigError("train_dataset is missing; pass a datasets.Dataset, a list of rows or a path.")
    if args.eval_strategy != "no" and evaluation is None:
        raise ConfigError(f"eval_strategy is {args.eval_strategy} but there is no eval_dataset. Pass one, or set no.")
    if args.n_gpu > 1:
        raise ConfigError(
            f"One process sees {args.n_gpu} GPUs, which it would use by splitting batches; a packed row cannot be. "
            f"Start with `torchrun --nproc_per_node {args.n_gpu}`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    return args


def make_audible(args: PreferenceConfig) -> None:
    """What a run says about its reference and its data must be seen, also in a script that never set up logging."""
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)


def loading(args: PreferenceConfig, *, tokenizer: bool = False) -> dict[str, Any]:
    """Keywords for loading what is named by a string."""
    options = dict(cast(dict[str, Any], args.model_init_kwargs or {}))
    options.setdefault("trust_remote_code", args.trust_remote_code)
    known = ("revision", "trust_remote_code")
    return {name: options[name] for name in known if name in options} if tokenizer else options


def policy_spec(source: str | Path, args: PreferenceConfig) -> ModelSpec:
    """How a policy that is named is loaded."""
    options = cast(dict[str, Any], args.model_init_kwargs or {})
    return ModelSpec.of(source, options, trust_remote_code=args.trust_remote_code)


def config_of(model: str | Path | nn.Module, args: PreferenceConfig) -> Any:
    """The configuration of a model in memory, or of one that is named; no weights are read."""
    return transformers_model(model).config if isinstance(model, nn.Module) else policy_spec(model, args).load_config()


def source_of(model: nn.Module) -> str:
    config = transformers_model(model).config
    return getattr(config, "_name_or_path", "") or "object in memory"


def router_coefficient(args: PreferenceConfig, policy: nn.Module) -> float:
    """Weight of the load-balancing loss: the option, or what the model's configuration says; 0 without experts."""
    model = transformers_model(policy)
    if not has_router(model):
        if args.router_aux_loss_coef:
            raise ConfigError(
                f"router_aux_loss_coef is {args.router_aux_loss_coef} and {type(model).__name__} has no experts to "
                "balance. Leave it unset."
            )
        return 0.0
    declared = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)
    weight = declared if args.router_aux_loss_coef is None else args.router_aux_loss_coef
    if weight:
        logger.info(
            f"experts: load-balancing loss of each micro-batch, weight {weight:g}, over the tokens of all sequences"
        )
    return weight


def at_the_start(policy: nn.Module, args: PreferenceConfig) -> nn.Module:
    """The policy on its device, with what trains chosen, and without dropout where that is asked for."""
    select_trainable(policy, args.train_parameters or (), args.freeze_parameters or ())
    if args.disable_dropout:
        disable_dropout(policy)
    # Where the weights will be cut, transformers would leave them on the CPU; the start is computed with before.
    if may_move(policy) and args.place_model_on_device is not False:
        policy.to(args.device)
    return policy


def for_task(peft_config: PeftConfig, policy: PreTrainedModel) -> PeftConfig:
    """The adapter's configuration with the task that the model does, which PEFT saves beside the adapter."""
    task = "SEQ_2_SEQ_LM" if policy.config.is_encoder_decoder else "CAUSAL_LM"
    task = "SEQ_CLS" if "ForSequenceClassification" in type(policy).__name__ else task
    if peft_config.task_type is None:
        return replace(peft_config, task_type=task)
    if peft_config.task_type not in (task, TaskType(task)):
        raise ConfigError(
            f"peft_config has the task_type {peft_config.task_type}, and {type(policy).__name__} does {task}; set "
            "that, or leave task_type out."
        )
    return peft_config


def with_adapter(policy: nn.Module, peft_config: PeftConfig | None, args: PreferenceConfig) -> nn.Module:
    if peft_config is None:
        return policy
    if isinstance(policy, PeftModel):
        raise ConfigError(
            "peft_config was given and the model already has an adapter. Leave peft_config out to continue that "
            "adapter, or merge it first with model.merge_and_unload()."
        )
    if not isinstance(policy, PreTrainedModel):
        raise ConfigError(f"peft_config needs a transformers model; a {type(policy).__name__} came.")
    if peft_config.is_prompt_learning and peft_config.peft_type != PeftType.PREFIX_TUNING:
        raise ConfigError(
            f"peft_config is {peft_config.peft_type}, which lengthens the input by virtual tokens; a packed row "
            "has no place for them. Use LoRA or another adapter on layers, or prefix tuning."
        )
    if peft_config.is_prompt_learning and args.gradient_checkpointing:
        raise ConfigError(
            "peft_config is prefix tuning, whose prefix is a key-value cache, and gradient checkpointing recomputes "
            "layers without one. Set gradient_checkpointing=False, or use LoRA or another adapter on layers."
        )
    peft_config = for_task(peft_config, policy)
    if getattr(peft_config, "lora_dropout", 0.0) and args.disable_dropout:
        logger.warning(
            "lora_dropout has no effect: disable_dropout is on, so that policy and reference differ by training"
        )
    # An adapter begins at random; two runs of one configuration begin alike.
    set_seed(args.seed)
    return get_peft_model(policy, peft_config)
