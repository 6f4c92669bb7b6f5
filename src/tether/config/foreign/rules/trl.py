"""TRL's command line and YAML: what its keys become. Fields of its configurations are ours, by their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments

from tether.config.fields import config_class, fields_under, keys_of, row_of
from tether.config.foreign.draft import OWN, Draft, Source
from tether.config.foreign.rules import shared, trl_data, trl_launch
from tether.config.foreign.table import load_table
from tether.errors import ConfigError
from tether.objectives import OBJECTIVES
from tether.training import PreferenceConfig
from tether.training.online.config import GENERATION

# TRL's commands, and a loss of a run file whose configuration has their options.
COMMANDS: dict[str, Any] = {
    "dpo": ["sigmoid"],
    "kto": "kto",
    "orpo": "orpo",
    "cpo": "cpo",
    "sft": "sft",
    "reward": "reward",
    "grpo": "dapo",
    "rloo": "rloo",
}
ONLINE = ("grpo", "rloo")
_REWARDS = ("reward_funcs", "reward_model_name_or_path")
# What describes a server that is started.
_OF_OWN_SERVER = ("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size")
_SFT = {"nll": "sft", "chunked_nll": "sft", "dft": "dft"}
_CPO = {"sigmoid": "cpo", "simpo": "simpo", "alphapo": "alphapo", "hinge": "hinge", "ipo": "ipo"}
# Losses of CPO that are DPO's without a reference, and a likelihood beside them.
_CPO_AS_DPO = ("hinge", "ipo")


def configuration(source: Source) -> type[PreferenceConfig]:
    """The configuration of TRL's command, or of the one that the keys speak for.

    Raises:
        ConfigError: there is no such command here, or the keys fit several.
    """
    command = source.command or guess(source)
    if command not in COMMANDS:
        raise ConfigError(f"{source.path}: there is no command {command!r}; there are {', '.join(COMMANDS)}.")
    source.command = command
    return config_class(COMMANDS[command])


def guess(source: Source) -> str:
    """Which command a file is for, by keys that only one has.

    Raises:
        ConfigError: several fit.
    """
    online = bool(source.values.keys() & {*_REWARDS, "num_generations"})
    common = {field.name for field in dataclasses.fields(TrainingArguments)} | {"tether"}
    common |= load_table("trl").keys() | load_table("transformers").keys()
    loss = source.get("loss_type")
    losses = {loss} if isinstance(loss, str) else set(loss or ())
    fitting = []
    for command, example in COMMANDS.items():
        config = config_class(example)
        if (
            (command in ONLINE) != online
            or config.algorithm is None
            or (source.values.keys() - common) - keys_of(config).keys()
        ):
            continue
        if losses <= OBJECTIVES[config.algorithm].keys():
            fitting.append(command)
    if not fitting:  # the keys are checked against one of them, which says what is wrong
        return "dpo"
    if len(fitting) != 1:
        raise ConfigError(
            f"{source.path} is a file of TRL, which does not say which trainer it is for, and {', '.join(fitting)} "
            f"would fit. Say it: `tether dpo --config {source.path}`, or `--as dpo`."
        )
    return fitting[0]


def _loss(draft: Draft, source: Source) -> None:
    command, given = source.command, source.get("loss_type")
    names = [given] if isinstance(given, str) else given
    if names is not None and not (isinstance(names, list) and names and all(isinstance(one, str) for one in names)):
        source.wrong("loss_type", given, "the name of a loss, or a list of names")
    for name in names or ():
        known = _SFT if command == "sft" else OBJECTIVES[config_class(COMMANDS[command]).algorithm or "dpo"]
        if name not in known:
            source.wrong("loss_type", name, ", ".join(known))
    key = "loss_type" if names else ""
    share = source.number("rpo_alpha") if command == "dpo" else None
    if share is not None:
        if names not in (None, ["sigmoid"]):
            source.refuse("rpo_alpha", "`rpo_alpha` adds a likelihood to one loss; name both in `loss_type`.")
        draft.set("objective.loss", ["sigmoid", "sft"], "rpo_alpha")
        draft.set("objective.weights", [1.0, share], "rpo_alpha")
        return
    loss: Any = {"kto": "kto", "orpo": "orpo", "reward": "reward", "rloo": "rloo", "grpo": "dapo"}.get(
        command, "sigmoid"
    )
    if command == "dpo":
        names = names or ["sigmoid"]
        alone = names[0] if len(names) == 1 and not source.has("loss_weights") else names
        loss = alone if config_class(alone).algorithm == "dpo" else names
    elif command == "cpo":
        loss = _named(source, _CPO, (names or ["sigmoid"])[0])
        if loss in _CPO_AS_DPO:
            _without_reference(draft, source, loss)
            return
    elif command == "sft":
        loss = _named(source, _SFT, (names or ["nll"])[0])
        if names == ["chunked_nll"]:
            draft.explain("loss_type", "the same loss; logits are computed in chunks in any case")
    elif names:
        loss = names[0]
    draft.set("objective.loss", loss, key)
    row, config = row_of(loss), config_class(loss)
    fields = fields_under("objective", config)
    for name, preset in row.preset.items() if row else ():
        if not source.has(fields[name]):
            default = config.__dataclass_fields__[fields[name]].default
            draft.set(f"objective.{name}", default, comment=f"TRL's default; a run file's {loss} has {preset}")


def _without_reference(draft: Draft, source: Source, loss: str) -> None:
    """A loss of CPO as one of DPO: the same formula of log-probs alone, and a likelihood of the chosen answers."""
    objective = draft.values.get("objective", {})
    for name in ("cpo_alpha", "simpo_gamma"):
        objective.pop(name, None)
    draft.note("simpo_gamma", "of loss_type: simpo")
    share = source.number("cpo_alpha", 1.0)
    draft.set("objective.loss", [loss, "sft"] if share else loss, "loss_type")
    draft.set("reference.meaning", "none", "loss_type")
    draft.explain("loss_type", f"the loss {loss} without a reference, as CPO computes it")
    if "cpo_alpha" in draft.fates:
        draft.fates["cpo_alpha"].became.clear()
    if share:
        draft.set("objective.weights", [1.0, share], "cpo_alpha" if source.has("cpo_alpha") else "")
        draft.explain("cpo_alpha", "a likelihood of the chosen answers beside the loss")
    else:
        draft.note("cpo_alpha", "no likelihood beside the loss")


def _named(source: Source, names: dict[str, str], given: str) -> str:
    if given not in names:
        source.wrong("loss_type", given, ", ".join(names))
    return names[given]


def _model(draft: Draft, source: Source) -> None:
    if not source.has("model_name_or_path"):
        source.refuse("model_name_or_path", "`model_name_or_path` is missing. Name the model.")
    shared.revision(draft, source, "model_revision", "model_name_or_path")
    dtype = source.get("dtype", source.get("torch_dtype"))
    if source.get("torch_dtype", dtype) != dtype:
        source.refuse("torch_dtype", "`torch_dtype` and `dtype` are one thing, and differ. Leave one of them out.")
    key = next((name for name in ("dtype", "torch_dtype") if source.has(name)), "")
    draft.set("model.dtype", dtype or "float32", key, comment="" if key else "TRL's default")
    if source.has("attn_implementation"):
        shared.load_plainly(draft, "attn_implementation", source.text("attn_implementation"))
    for key, name in (("load_in_4bit", "4bit"), ("load_in_8bit", "8bit")):
        if source.flag(key):
            draft.set("model.quantization", name, key)
    shared.four_bits(draft, source, source.flag("use_bnb_nested_quant"), "use_bnb_nested_quant")
    quant_type = source.one_of("bnb_4bit_quant_type", ("nf4", "fp4"), "nf4")
    shared.four_bits(draft, source, quant_type, "bnb_4bit_quant_type")
    shared.four_bits(draft, source, source.text("bnb_4bit_quant_storage", "uint8"), "bnb_4bit_quant_storage")
    if source.has("chat_template"):
        draft.set("model.chat_template", source.text("chat_template"), "chat_template")
    if source.has("eos_token"):
        draft.set("model.special_tokens", {"eos_token": source.text("eos_token")}, "eos_token")
    for name, value in source.mapping("model_init_kwargs").items():
        place = {
            "dtype": "dtype",
            "torch_dtype": "dtype",
            "revision": "revision",
            "attn_implementation": "attention",
            "device_map": "device",
            "trust_remote_code": "trust_remote_code",
        }
        if name in ("use_cache", "low_cpu_mem_usage"):
            draft.explain("model_init_kwargs", f"{name} has no effect on what is trained")
            continue
        if name not in place:
            source.refuse(("model_init_kwargs", name), f"`{name}` has no key in a run file. Take it out.")
        del_default = name in ("dtype", "torch_dtype") and not source.has("dtype")
        if del_default:
            draft.values["model"].pop("dtype")
        draft.set(f"model.{place[name]}", value, "model_init_kwargs")


def _adapter(draft: Draft, source: Source) -> None:
    names = {
        "r": ("lora_r", 16),
        "lora_alpha": ("lora_alpha", 32),
        "lora_dropout": ("lora_dropout", 0.05),
        "target_parameters": ("lora_target_parameters", None),
        "modules_to_save": ("lora_modules_to_save", None),
        "use_rslora": ("use_rslora", None),
        "use_dora": ("use_dora", None),
    }
    if not source.flag("use_peft"):
        for key in (*(key for key, _ in names.values()), "lora_target_modules"):
            draft.note(key, "use_peft is not set", "has no effect without use_peft")
        return
    options = {
        peft: (source.get(key, default), key if source.has(key) else "") for peft, (key, default) in names.items()
    }
    for peft, key in (("target_parameters", "lora_target_parameters"), ("modules_to_save", "lora_modules_to_save")):
        options[peft] = (source.names(key), key if source.has(key) else "")
    targets = source.names("lora_target_modules")
    one = targets == ["all-linear"]
    options["target_modules"] = ("all-linear" if one else targets, "lora_target_modules" if targets else "")
    draft.fates["use_peft"].became.append("lora")
    shared.adapter(draft, options)


def _steps(draft: Draft, source: Source) -> None:
    shared.warmup(draft, source)
    for target, default in (("per_device_train_batch_size", 8), ("gradient_accumulation_steps", 1)):
        if draft.get(f"train.{target}") is None:
            draft.set(f"train.{target}", default, comment="TRL's default")
    if not source.has("output_dir"):
        draft.set("output", "trainer_output", comment="TRL's default")
    shared.resumed(draft, source)


def _rewards(draft: Draft, source: Source) -> None:
    given = [key for key in (*_REWARDS, "reward_weights") if source.has(key)]
    if source.command not in ONLINE:
        if given:
            source.refuse(given[0], f"`{given[0]}` is of grpo and rloo, which sample completions. Take it out.")
        return
    if not source.has("disable_dropout"):
        draft.set("train.disable_dropout", False, comment="TRL's default")
    shared.scale_of_rewards(draft)
    model = source.text("reward_model_name_or_path")
    found = [{"model": model}] if model else []
    found += [shared.reward_function(source, ("reward_funcs",), name) for name in source.names("reward_funcs") or ()]
    if not found:
        source.refuse(
            "reward_funcs", "`reward_funcs` is missing: something must judge the completions. Name functions."
        )
    draft.set("rewards", shared.weighted(source, found, source.get("reward_weights"), ("reward_weights",)), given[0])


def _rollouts(draft: Draft, source: Source) -> None:
    """`use_vllm` and what is of it, and `generation_kwargs`; other settings of rollouts are fields by their names."""
    known = keys_of(config_class(COMMANDS[source.command]))
    mode = source.one_of("vllm_mode", ("colocate", "server"), "colocate")
    if source.flag("use_vllm"):
        draft.set("rollout.engine", "vllm", "use_vllm")
        if mode == "colocate" and not source.has("vllm_server_base_url"):
            own = source.mapping(OWN).get("rollout")
            if not (isinstance(own, dict) and own.get("vllm_python")):
                source.refuse(
                    "use_vllm",
                    "vLLM needs other versions of packages, so that its server runs in an environment of its own. Name "
                    "that one's Python: `tether: {rollout: {vllm_python: …}}`, or `tether.rollout.vllm_python=…`.",
                )
            idle, why = ("vllm_server_host", "vllm_server_port"), "the run starts a server of its own"
        else:
            idle, why = _OF_OWN_SERVER, "of a server that is started, and one runs already"
    else:
        idle = [key for key in source.values if key in known and known[key].startswith("rollout.vllm_")]
        why = "use_vllm is not set"
    for key in idle:
        if key in draft.fates:
            draft.values.get("rollout", {}).pop(known[key].removeprefix("rollout."), None)
            draft.note(key, why, f"has no effect: {why}")
    if "rollout" in draft.values and not draft.values["rollout"]:
        del draft.values["rollout"]
    for name, value in source.mapping("generation_kwargs").items():
        if name not in GENERATION:
            source.refuse(
                ("generation_kwargs", name),
                f"`{name}` would change what is sampled unseen. There are {', '.join(GENERATION)}.",
            )
        draft.set(known[GENERATION[name]], value, "generation_kwargs")


def _reference(draft: Draft, source: Source) -> None:
    if source.flag("reference_free"):
        draft.set("reference.meaning", "none", "reference_free")
    if source.flag("sync_ref_model"):
        draft.set("reference.sync.alpha", source.number("ref_model_mixup_alpha", 0.6), "sync_ref_model")
        draft.set("reference.sync.steps", source.number("ref_model_sync_steps", 512), "sync_ref_model")
    for key in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
        if not source.get("sync_ref_model"):
            draft.note(key, "sync_ref_model is not set", "has no effect without sync_ref_model")


def _environment(draft: Draft, source: Source) -> None:
    trl_launch.launch(draft, source)
    for name, value in source.mapping("env").items():
        shared.environment(draft, str(name), value, "env")


RULES: dict[str, Callable[[Draft, Source], None]] = {
    "loss": _loss,
    "model": _model,
    "adapter": _adapter,
    "data": trl_data.data,
    "rewards": _rewards,
    "rollouts": _rollouts,
    "steps": _steps,
    "reference": _reference,
    "environment": _environment,
}
