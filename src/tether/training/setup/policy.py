"""What a trainer's constructor asks before and while it loads: arguments, sources, adapters."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, PeftType, TaskType
from torch import nn
from transformers import PreTrainedModel, set_seed

from tether.compat.launcher import OTHER_SIZES, SIZES, number
from tether.data import text_tokenizer
from tether.data.images.sizes import use_sizes
from tether.errors import ConfigError, DataError, ScoringError
from tether.models.adapters import (
    adapter_folders,
    continue_adapter,
    new_adapter,
    refuse_unfit_virtual_tokens,
    stack_adapter,
    train_new_tokens,
)
from tether.models.before.limits import Limits
from tether.models.chat_template import use_chat_template
from tether.models.spec import ModelSpec, refuse_spread, select_trainable, use_tokens
from tether.models.structure import adapter_configs, disable_dropout, evaluation_mode, transformers_model
from tether.progress import Lines
from tether.reference.methods.model import may_move
from tether.scoring.router import has_router, lacking_router
from tether.training.checkpoint import refuse_silent_reanchoring
from tether.training.config import PreferenceConfig
from tether.training.saving.preflight import check_before_loading
from tether.training.step import batch_of

logger = logging.getLogger("tether")
_IN_MEMORY = "object in memory"
# Where launchers say how many processes they started.
_PROCESSES = (*SIZES, *OTHER_SIZES)
_NOTHING_TRAINS = (
    "The policy's weights are quantised and there is no adapter, so nothing could train. Add one (`peft_config`, in a "
    "run file `lora:` or `peft:`), or leave the quantisation out."
)


def check_arguments(
    args: PreferenceConfig, wanted: type[PreferenceConfig], train: Any, evaluation: Any, quantization: Any
) -> PreferenceConfig:
    """The arguments of a run, found to be fit for one; with the quantisation that was given beside them, as in TRL."""
    if not isinstance(args, wanted):
        kind = type(args)
        theirs = kind.__module__.partition(".")[0] == "trl"
        advice = (
            f"import {kind.__name__} from tether in place of trl; names and defaults are the same" if theirs else ""
        )
        raise ConfigError(
            f"args is a {'trl.' * theirs}{kind.__name__}; "
            + (advice or f"pass a configuration such as {wanted.__name__}(output_dir=...)")
            + "."
        )
    if train is None:
        raise ConfigError("train_dataset is missing; pass a datasets.Dataset, a list of rows or a path.")
    if args.eval_strategy != "no" and evaluation is None:
        raise ConfigError(f"eval_strategy is {args.eval_strategy} but there is no eval_dataset. Pass one, or set no.")
    _require_one_run(args)
    if args.n_gpu > 1:
        raise ConfigError(
            f"One process sees {args.n_gpu} GPUs, which it would use by splitting batches; a packed row cannot be. "
            f"Start with `torchrun --nproc_per_node {args.n_gpu}`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    check_before_loading(args)
    make_audible(args)
    return args if quantization is None else _with_quantization(args, quantization)


def default_arguments(model: str | Path | nn.Module, wanted: type[PreferenceConfig]) -> PreferenceConfig:
    """The configuration where none was given, as in TRL: all defaults, in a folder named after model and trainer."""
    source = str(model) if isinstance(model, (str, Path)) else source_of(model)
    name = Path(source).name if source != _IN_MEMORY else type(transformers_model(cast(nn.Module, model))).__name__
    return wanted(output_dir=f"{name}-{wanted.__name__.removesuffix('Config')}")


def _require_one_run(args: PreferenceConfig) -> None:
    """Several processes that a launcher started must be one run, or each trains alone and writes the same folder."""
    started = max(number(name, 1) for name in _PROCESSES)
    if started > 1 and args.world_size == 1:
        name = next(name for name in _PROCESSES if number(name, 1) == started)
        raise ConfigError(
            f"{started} processes were started ({name}), and each would be a run of its own that writes the folder "
            f"{args.output_dir!r}. Start them with `torchrun --nproc_per_node {started}` or `accelerate launch`, or "
            "start one; on a machine where they cannot be joined, unset the variable."
        )
    if args.auto_find_batch_size and args.world_size > 1:
        raise ConfigError(
            "is True in a run of several processes: one that begins again would leave the others waiting. Leave it "
            "out; max_tokens_per_forward bounds what is computed at once.",
            "auto_find_batch_size",
        )


def _with_quantization(args: PreferenceConfig, quantization: Any) -> PreferenceConfig:
    """A copy of the arguments; the caller's own may be used for another run."""
    given = cast(dict[str, Any], args.model_init_kwargs or {})
    if {"quantization", "quantization_config"} & given.keys():
        raise ConfigError(
            "quantization_config was given as an argument of the trainer and model_init_kwargs has one too. Leave one "
            "out."
        )
    args = copy(args)
    # As plain values, so that the arguments can still be written as JSON.
    plain = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
    args.model_init_kwargs = {**given, "quantization_config": plain}
    return args


def make_audible(args: PreferenceConfig) -> None:
    """What a run says about its reference and its data must be seen, also in a script that never set up logging."""
    if not logger.hasHandlers():
        logger.addHandler(Lines())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)


def use_pad_token(tokenizer: Any, token: str | None) -> None:
    """Have a tokenizer pad with the token that was asked for; it is saved with the model, and no row here is padded.

    Raises:
        ConfigError: the vocabulary lacks it.
    """
    if token is None or token == tokenizer.pad_token:
        return
    if token not in tokenizer.get_vocab():
        raise ConfigError(f"is {token!r}, which the tokenizer's vocabulary lacks. Name one it has.", "pad_token")
    tokenizer.pad_token = token
    logger.info(f"tokenizer: pads with {token!r} from now on")


def check_collator(collator: Any, rows: Dataset) -> None:
    """Refuse a collator that makes no batch of prepared rows, before weights load.

    Raises:
        ConfigError: with what it did with two of them.
    """
    if collator is None:
        return
    try:
        batch_of(collator([rows[i] for i in range(min(2, len(rows)))]))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"data_collator: {type(collator).__name__} fails on prepared rows ({type(error).__name__}: {error}), whose "
            f"columns are {', '.join(rows.column_names)}. Leave it out: rows are packed without padding. Your own must "
            "return {'batch': ScoringBatch}, as tether.training.step.collate does."
        ) from error


_EFFECTS = {
    "weight": "multiplies the loss of its row",
    "margin": "is subtracted from the difference of rewards, or is the gap to fit",
}


def announce_columns(columns: tuple[str, ...], train: Dataset, evaluation: Any, *, complete: bool) -> None:
    """Say which columns of numbers change the loss; they may have come with the data for another purpose.

    Args:
        columns: that the algorithm reads.
        train: the training rows, or the first ones of a stream.
        evaluation: the evaluation rows, a dictionary of them, or None.
        complete: whether `train` is all training rows.

    Raises:
        DataError: no row of a set counts.
    """
    named = evaluation if isinstance(evaluation, dict) else {} if evaluation is None else {"": evaluation}
    sets = {"": train, **{f"eval_{name}: " if name else "eval: ": rows for name, rows in named.items()}}
    for prefix, rows in sets.items():
        for column in columns:
            if column in _EFFECTS and column in rows.column_names:
                values = rows.with_format(None)[column][:]
                if column == "weight" and max(values) == 0 and (complete or prefix):
                    raise DataError(
                        f"{prefix or 'train: '}every row has the weight 0, so that none of them counts. Give some of "
                        "them another weight, or remove the column."
                    )
                part = "" if complete or prefix else ", in the first rows"
                logger.info(
                    f"{prefix}column `{column}`: used; it {_EFFECTS[column]}; from {min(values):g} to {max(values):g}, "
                    f"mean {sum(values) / len(values):g}{part}. Remove it where that is not meant."
                )


def policy_spec(source: str | Path, args: PreferenceConfig) -> ModelSpec:
    """How a policy that is named is loaded."""
    options = cast(dict[str, Any], args.model_init_kwargs or {})
    return ModelSpec.of(source, options, trust_remote_code=args.trust_remote_code)


def processing_of(source: str | Path, args: PreferenceConfig, given: Any = None) -> tuple[Any, list[int]]:
    """The tokenizer or processor of a run, with its new tokens and its chat template, and the ids of the new tokens.

    Args:
        source: the policy that is named.
        args: the run's.
        given: the one that was passed; it is changed in place.
    """
    processing = given or policy_spec(source, args).load_processing()
    special: Any = dict(cast(dict[str, str], args.special_tokens or {}))
    if getattr(args, "eos_token", None) is not None:  # of the trainers of texts
        special["eos_token"] = args.eos_token  # type: ignore[attr-defined]
    new_tokens = use_tokens(text_tokenizer(processing), args.add_tokens or (), special)
    use_sizes(processing, cast("dict[str, Any] | None", args.image_sizes))
    if args.chat_template_path is not None:
        use_chat_template(processing, args.chat_template_path)
    return processing, new_tokens


def check_policy(model: Any, ref_model: Any, args: PreferenceConfig, peft_config: PeftConfig | None) -> None:
    """Refuse, before weights are read, a policy that cannot be loaded as is said, or in which nothing could train."""
    if not isinstance(model, (str, Path)):
        if isinstance(model, nn.DataParallel):
            raise ConfigError(
                "The policy is in a torch.nn.DataParallel, whose copies nothing here could prove. Give the model "
                "itself (`model.module`), and start a process for each device: `torchrun --nproc_per_node N`."
            )
        if (parts := getattr(transformers_model(model), "tp_size", None) or 1) > 1:
            raise ConfigError(
                f"The policy's weights were cut into {parts} parts when it was loaded (tp_plan or distributed_config); "
                "the processes that hold them must compute the same rows, and here each has its own. Load it whole, "
                "and let FSDP or DeepSpeed's ZeRO cut it."
            )
        if args.model_init_kwargs and not isinstance(ref_model, (str, Path)):
            raise ConfigError(
                "model_init_kwargs or a quantization_config was given with models in memory, which they cannot change. "
                "Leave them out."
            )
        if peft_config is not None and isinstance(model, nn.Module):
            _refuse_second_adapter(model)
        return
    spec = policy_spec(model, args)
    spec.require_device()
    refuse_spread(spec.device_map, args.world_size)
    if args.reference is None and ref_model is None:
        for folder in (model, *spec.adapters):
            refuse_silent_reanchoring(str(folder))
    if peft_config is None and not spec.brings_adapter and (spec.is_quantized or _is_saved_quantized(spec)):
        raise ConfigError(_NOTHING_TRAINS)


def _is_saved_quantized(spec: ModelSpec) -> bool:
    return getattr(spec.load_config(), "quantization_config", None) is not None


def config_of(model: str | Path | nn.Module, args: PreferenceConfig) -> Any:
    """The configuration of a model in memory, or of one that is named; no weights are read."""
    return transformers_model(model).config if isinstance(model, nn.Module) else policy_spec(model, args).load_config()


def source_of(model: nn.Module) -> str:
    config = transformers_model(model).config
    return getattr(config, "name_or_path", "") or _IN_MEMORY


def check_router(args: PreferenceConfig, limits: Limits) -> None:
    """Refuse a weight for the load-balancing loss of a model that has none, as far as its code says so.

    Raises:
        ConfigError: there is none.
    """
    if args.router_aux_loss_coef:
        model = limits.built
        lacking = "" if model is None else lacking_router(model)
        if lacking:
            raise ConfigError(f"router_aux_loss_coef is {args.router_aux_loss_coef} and {lacking}. Leave it unset.")


def router_coefficient(args: PreferenceConfig, policy: nn.Module, measure: Callable[[], Any]) -> float:
    """Weight of the load-balancing loss: the option, or what the model's configuration says; 0 where there is none.

    Args:
        args: of the run.
        policy: as it is trained.
        measure: scores a few rows with that loss.

    Raises:
        ConfigError: the option was set, and the model gives no such loss.
    """
    model = transformers_model(policy)
    wanted = args.router_aux_loss_coef
    declared = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) if has_router(model) else 0.0
    weight = declared if wanted is None else wanted
    if not weight:
        return 0.0
    lacking = lacking_router(model) or _without_router_loss(model, measure)
    if lacking and wanted:
        raise ConfigError(f"router_aux_loss_coef is {wanted} and {lacking}. Leave it unset.")
    if lacking:
        logger.info(f"experts: no load-balancing loss, although the configuration weighs one by {weight:g}: {lacking}")
        return 0.0
    logger.info(
        f"experts: load-balancing loss of each micro-batch, weight {weight:g}, over the tokens of all sequences"
    )
    return weight


def _without_router_loss(model: PreTrainedModel, measure: Callable[[], Any]) -> str:
    """Why scoring gives no load-balancing loss, found by asking for it; empty where it does."""
    try:
        with torch.no_grad(), evaluation_mode(model):
            loss = getattr(measure(), "aux_loss", None)
    except (ScoringError, ConfigError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"{type(model).__name__} gives none ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    given = isinstance(loss, torch.Tensor) and bool(loss.isfinite())
    return "" if given else f"{type(model).__name__}, scored as this run scores it, gives none"


def at_the_start(policy: nn.Module, args: PreferenceConfig) -> nn.Module:
    """The policy on its device, with what trains chosen, and without dropout where that is asked for."""
    _require_place(policy, args)
    select_trainable(policy, args.train_parameters or (), args.freeze_parameters or ())
    if args.disable_dropout:
        disable_dropout(policy)
    # Where the weights will be cut, transformers would leave them on the CPU; the start is computed with before.
    if may_move(policy) and args.place_model_on_device is not False:
        policy.to(args.device)
    return policy


def _require_place(policy: nn.Module, args: PreferenceConfig) -> None:
    """A policy begins where its batches are, and all of it is on devices; a `device_map` may say otherwise."""
    placed: dict[str, Any] = getattr(transformers_model(policy), "hf_device_map", None) or {}
    if not placed:
        return
    places = ", ".join(sorted({str(place) for place in placed.values()}))
    if any(parameter.is_meta for parameter in policy.parameters()):
        raise ConfigError(
            f"device_map has spread the policy over {places} and left weights outside the devices, where they cannot "
            "be trained. Name devices that hold all of it, quantise it, or shard it with FSDP."
        )
    if len(set(placed.values())) > 1 and args.world_size > 1:
        raise ConfigError(
            f"device_map has spread the policy over {places}, and the run has {args.world_size} processes, each of "
            "which would want all of them. Run one process, or name one device, or shard it with FSDP."
        )
    here, inputs = args.device, transformers_model(policy).get_input_embeddings()
    there = next(inputs.parameters(), torch.empty(0, device=here)).device
    if here.type != there.type or (here.index != there.index and None not in (here.index, there.index)):
        raise ConfigError(
            f"device_map has put the policy on {there}, and the run computes on {here}. Leave device_map out"
            + (", or set use_cpu." if there.type == "cpu" else ", or show the run that device alone.")
        )


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


def learning_tokens(
    peft_config: PeftConfig | None, ids: list[int], policy: nn.Module, args: PreferenceConfig
) -> PeftConfig | None:
    """The configuration of the new adapter, with which new tokens are learnt too."""
    if peft_config is not None and not isinstance(policy, PeftModel):
        return train_new_tokens(peft_config, ids, transformers_model(policy))
    if ids and cast(dict[str, Any], args.model_init_kwargs or {}).get("adapter"):
        raise ConfigError(
            "add_tokens was given with an adapter that is continued, in which nothing would train the new tokens' "
            "embeddings. Merge it into its base first, or put a new adapter over it (`peft_config`, or `lora:`)."
        )
    return peft_config


def with_adapter(policy: nn.Module, peft_config: PeftConfig | None, args: PreferenceConfig) -> nn.Module:
    """The policy with the adapter that was asked for: a new one, one that is continued, or a new one over a frozen one.

    Args:
        policy: as it was loaded, without what `adapter` in `model_init_kwargs` names.
        peft_config: of a new adapter, or None.
        args: the run's.

    Raises:
        ConfigError: the two cannot be put together, or nothing would train.
    """
    folder = cast(dict[str, Any], args.model_init_kwargs or {}).get("adapter")
    if peft_config is None:
        if folder is not None:
            policy = continue_adapter(cast(PreTrainedModel, policy), folder)
        if isinstance(policy, PeftModel):
            _refuse_virtual_tokens(policy.active_peft_config, transformers_model(policy), args)
        elif getattr(policy, "is_quantized", False):
            raise ConfigError(_NOTHING_TRAINS)
        return policy
    _refuse_second_adapter(policy)
    if not isinstance(policy, PreTrainedModel):
        raise ConfigError(f"peft_config needs a transformers model; got a {type(policy).__name__}.")
    _refuse_virtual_tokens(peft_config, policy, args)
    peft_config = _with_revision(for_task(peft_config, policy), args)
    if getattr(peft_config, "lora_dropout", 0.0) and args.disable_dropout:
        logger.warning(
            "lora_dropout has no effect: disable_dropout is on, so that policy and reference differ by training"
        )
    # An adapter begins at random; two runs of one configuration begin alike.
    set_seed(args.seed)
    if folder is None:
        return new_adapter(policy, peft_config)
    stacked = stack_adapter(policy, folder, peft_config)
    logger.info(f"adapter: a new one over {', '.join(map(str, adapter_folders(folder)))}; only the new one trains")
    return stacked


def _refuse_second_adapter(policy: nn.Module) -> None:
    """A new adapter over one that is there would take its place where it has its name, and stand on it elsewhere."""
    names = ", ".join(map(repr, adapter_configs(policy)))
    if names:
        raise ConfigError(
            f"peft_config was given and the model already has an adapter, {names}. Leave peft_config out to continue "
            "that adapter; or merge it first (model.merge_and_unload() of peft); or, to freeze it beneath the new one, "
            "name its base as the model and its folder as `adapter` in model_init_kwargs (in a run file "
            "`model.adapter`)."
        )


def _with_revision(peft_config: PeftConfig, args: PreferenceConfig) -> PeftConfig:
    """The configuration of a new adapter with its base's revision, without which the adapter leads to another base."""
    revision = cast(dict[str, Any], args.model_init_kwargs or {}).get("revision")
    return peft_config if revision is None else replace(peft_config, revision=revision)


def _refuse_virtual_tokens(config: PeftConfig, policy: PreTrainedModel, args: PreferenceConfig) -> None:
    refuse_unfit_virtual_tokens(config, policy.config)
    if config.peft_type == PeftType.PREFIX_TUNING and args.gradient_checkpointing:
        raise ConfigError(
            "peft_config is prefix tuning, whose prefix is a key-value cache, and gradient checkpointing recomputes "
            "layers without one. Set gradient_checkpointing=False, or use LoRA or another adapter on layers."
        )
