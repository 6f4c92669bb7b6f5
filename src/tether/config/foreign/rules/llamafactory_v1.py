"""LLaMA-Factory's v1 layout (`USE_V1`, `llamafactory-cli sft|dpo|rm`): what its keys become, with its defaults.

A plugin is a mapping with a `name`; a key of it that its code does not read is an error there, and so here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tether.config.foreign.document import read_foreign
from tether.config.foreign.draft import Draft, Source, as_number
from tether.config.foreign.rules import llamafactory, llamafactory_model, shared
from tether.errors import ConfigError

# Its commands, and a loss of a run file whose configuration has their options.
COMMANDS: dict[str, Any] = {"sft": "sft", "dpo": ["sigmoid"], "rm": "reward"}
_OF_PREFERENCE = ("pref_loss", "pref_beta", "pref_ftx", "simpo_gamma", "dpo_label_smoothing", "ld_alpha")
# Keys of a plugin by its name.
_LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "modules_to_save")
_EXPORT = ("export_dir", "export_size", "export_hub_model_id", "infer_dtype", "export_legacy_format")
_FREEZE = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
_PEFT = {
    "lora": (*_LORA, "adapter_name_or_path", *_EXPORT),
    "freeze": (*_FREEZE, "cast_trainable_params_to_fp32"),
}
_QUANTIZED = ("quantization_bit", "quantization_type", "double_quantization", "compute_dtype")
_FSDP = ("dcp_path", "mixed_precision", "reshard_after_forward", "offload_params", "pin_memory", "dp_size", "cp_size")
_SHARDED = {"fsdp2": (*_FSDP, "cp_mode", "mp_shard_size", "mp_replicate_size"), "deepspeed": ("config_file",)}
_ADAMW = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
_CONVERTERS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "pair": ""}
_SETS = ("path", "source", "split", "converter", "size", "weight", "streaming", "name", "subset")


def _guess(source: Source) -> str:
    if source.get("model_class") == "cls":
        return "rm"
    if any(source.has(key) for key in _OF_PREFERENCE):
        return "dpo"
    if not any(entry.get("converter") == "pair" for entry in _entries(source, "train_dataset").values()):
        return "sft"  # as `llamafactory-cli train` takes it
    if not source.has("model_class"):
        raise ConfigError(
            f"{source.path} has pairs of answers, and does not say whether `dpo` or `rm` is to train on them. Say "
            "--as dpo or --as rm, as in llamafactory-cli dpo."
        )
    return "dpo"


def _plugin(source: Source, key: str, known: dict[str, tuple[str, ...]]) -> tuple[str, dict[str, Any]]:
    """Name and settings of a plugin; an empty name where none is asked for."""
    given = {name: value for name, value in source.mapping(key).items() if value is not None}
    if not given:
        return "", {}
    name = given.pop("name", None)
    if name not in known:
        source.wrong((key, "name"), name, ", ".join(known))
    if strange := sorted(given.keys() - set(known[name])):
        source.refuse((key, strange[0]), f"`{key}.{strange[0]}` is not read; {name} has {', '.join(known[name])}.")
    return name, given


def _objective(draft: Draft, source: Source) -> None:
    if source.command and source.command not in COMMANDS:
        raise ConfigError(
            f"--as is '{source.command}', and {source.path} is a file of LLaMA-Factory's v1; allowed are "
            f"{', '.join(COMMANDS)}."
        )
    source.one_of("model_class", ("llm", "cls"))
    source.command = command = source.command or _guess(source)
    draft.note("model_class", f"the model is loaded as {command} needs it")
    if command != "dpo":
        shared.objective(draft, COMMANDS[command], "", {})
        for key in _OF_PREFERENCE:
            draft.note(key, f"of dpo, and this is {command}", f"is not read by {command}")
        if command == "sft":
            draft.set("train.turns", "assistant", comment="LLaMA-Factory trains on the assistant's turns")
        return
    loss, options = llamafactory.preference(source, ("sigmoid", "simpo", "orpo"))
    options["beta"] = (source.number("pref_beta", 0.1), "pref_beta" if source.has("pref_beta") else "")
    for name, key in (("label_smoothing", "dpo_label_smoothing"), ("ld_alpha", "ld_alpha")):
        if source.has(key):
            options[name] = (source.number(key), key)
    if source.has("simpo_gamma"):
        options["simpo_gamma"] = (source.number("simpo_gamma"), "simpo_gamma")
    shared.objective(draft, loss, "pref_loss" if source.has("pref_loss") else "", options)
    llamafactory.odds_ratio(draft, loss)
    for key in _OF_PREFERENCE:
        if key in draft.fates and not draft.fates[key].became and draft.fates[key].mark != "note":
            draft.note(key, f"the loss {loss!r} does not take it", "has no effect with it")


def _model(draft: Draft, source: Source) -> None:
    if not source.has("model"):
        source.refuse("model", "`model` is missing. Name it.")
    if source.get("flash_attn", "sdpa") != "sdpa":
        shared.load_plainly(draft, "flash_attn", source.text("flash_attn"))
    _, given = _plugin(source, "quant_config", dict.fromkeys(("bnb", "auto"), _QUANTIZED))
    if source.has("quant_config"):
        bits = as_number(given.get("quantization_bit", 4))
        if bits not in (4, 8):
            source.wrong(("quant_config", "quantization_bit"), bits, "4 or 8")
        kind, double = given.get("quantization_type", "nf4"), given.get("double_quantization", True)
        detailed = bits == 4 and (kind, double) != ("nf4", True)
        draft.set("model.quantization", {"type": kind, "double": double} if detailed else f"{bits}bit", "quant_config")
        if "compute_dtype" in given:
            draft.explain("quant_config", "compute_dtype: what is computed in follows bf16")
    if source.has("template"):
        llamafactory.template(draft, source)


def _adapter(draft: Draft, source: Source) -> None:
    name, given = _plugin(source, "peft_config", _PEFT)
    if not name:
        draft.set("model.dtype", "float32", comment="LLaMA-Factory trains all of a model in float32")
        return
    if unread := [key for key in given if key.startswith("export_") or key == "infer_dtype"]:
        source.refuse(
            ("peft_config", unread[0]),
            f"`peft_config.{unread[0]}` is of a file that trains nothing. To write an adapter into its model: tether "
            "merge ADAPTER --output FOLDER.",
        )
    if name == "freeze":
        parts, further = (source.listed(("peft_config", key), given.get(key)) for key in _FREEZE[1:])
        count = as_number(given.get(_FREEZE[0], 2))
        llamafactory_model.last_layers(draft, "peft_config", ("peft_config", _FREEZE[0]), count, parts, further)
        return
    if (folder := given.get("adapter_name_or_path")) is not None:
        if not isinstance(folder, str):
            source.wrong(("peft_config", "adapter_name_or_path"), folder, "the folder of one adapter")
        draft.set("model.adapter", folder, "peft_config")
        draft.explain("peft_config", "the adapter that is named is continued as it is")
        if source.command == "dpo":
            theirs = llamafactory_model.their_reference([], folder)
            llamafactory_model.continued_reference(draft, "peft_config", theirs)
        return
    defaults = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all"}
    settings = {key: (value, "peft_config" if key in given else "") for key, value in {**defaults, **given}.items()}
    targets = source.listed(("peft_config", "target_modules"), settings["target_modules"][0])
    settings["target_modules"] = ("all-linear" if targets == ["all"] else targets, "peft_config")
    dropout = settings.pop("lora_dropout")
    if shared.disables_dropout(draft):
        draft.explain("peft_config", "lora_dropout: every dropout is switched off by this trainer (disable_dropout)")
    elif dropout[0]:
        settings["lora_dropout"] = dropout
    shared.adapter(draft, settings)


def _data(draft: Draft, source: Source) -> None:
    if source.has("train_dataset") and source.has("dataset"):
        source.refuse("dataset", "`dataset` and `train_dataset` are one thing. Leave one of them out.")
    key = "dataset" if source.has("dataset") else "train_dataset"
    if not source.text(key):
        source.refuse(key, "`train_dataset` is missing. Name the rows, or a YAML file of data sets.")
    draft.set("data.train", _sets(draft, source, key), key)
    if source.text("eval_dataset"):
        draft.set("data.eval", _sets(draft, source, "eval_dataset"), "eval_dataset")
        draft.explain("eval_dataset", "", "reads it, and evaluates nothing")
    draft.set("train.dataloader_drop_last", True, comment="as LLaMA-Factory: a last step with fewer rows is left out")


def _entries(source: Source, key: str) -> dict[str, dict[str, Any]]:
    """The data sets that a key names, by their names."""
    name = source.text(key) or ""
    if not name.endswith((".yaml", ".yml")):
        return {name: {"path": name}} if name else {}
    if not Path(name).expanduser().is_file():
        source.refuse(
            key, f"`{key}` is {name!r}, which is not a file here; one of the hub is not fetched. Put it into a folder."
        )
    found = read_foreign(Path(name).expanduser()).values
    for said, entry in found.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            source.refuse(key, f"the data set {said!r} of {name} has no `path`.")
        if strange := sorted(set(map(str, entry)) - set(_SETS)):
            source.refuse(key, f"the data set {said!r} of {name} has `{strange[0]}`; known are {', '.join(_SETS)}.")
    return found


def _sets(draft: Draft, source: Source, key: str) -> Any:
    made = [_set(draft, source, key, name, entry) for name, entry in _entries(source, key).items()]
    return made if len(made) > 1 else made[0]


def _set(draft: Draft, source: Source, key: str, name: str, entry: dict[str, Any]) -> Any:
    given = {part: value for part, value in entry.items() if value is not None}
    if given.get("source", "hf_hub") not in ("hf_hub", "local"):
        source.refuse(key, f"the data set {name!r} has the source {given['source']!r}; known are hf_hub and local.")
    converter = given.get("converter")
    if converter is not None and converter not in list(_CONVERTERS):
        source.refuse(
            key, f"the data set {name!r} has the converter {converter!r}; known are {', '.join(_CONVERTERS)}."
        )
    rows: dict[str, Any] = {"path": given["path"]}
    if converter in ("alpaca", "sharegpt"):
        rows["format"] = _CONVERTERS[converter]
        if converter == "alpaca":
            draft.explain(key, "alpaca: instruction and input on lines of their own; there without a line feed between")
    elif converter is None and source.command != "sft":
        rows["fields"] = {name: f"{name}_messages" for name in ("chosen", "rejected")}
    if given.get("split", "train") != "train":
        rows["split"] = given["split"]
    for theirs, ours in (("name", "name"), ("subset", "name"), ("size", "first"), ("weight", "weight")):
        if theirs in given:
            rows[ours] = given[theirs]
    if {"size", "weight"} & given.keys():
        draft.explain(key, f"{name}: the first rows, and each as often as its weight says; there they are drawn")
    if given.get("streaming"):
        draft.set("data.streaming", True, key)
    return rows["path"] if rows.keys() == {"path"} else rows


def _precision(draft: Draft, source: Source) -> None:
    wanted, sharded = source.flag("bf16", True), bool(source.mapping("dist_config"))
    draft.set("train.bf16", wanted and sharded, "bf16" if source.has("bf16") else "")
    if wanted and not sharded:
        draft.comments["train.bf16"] = "LLaMA-Factory computes in bfloat16 under dist_config alone"


def _steps(draft: Draft, source: Source) -> None:
    micro, total = source.number("micro_batch_size", 1), source.number("global_batch_size")
    if total is not None and (not isinstance(micro, int) or micro < 1 or total % micro):
        source.refuse(
            "global_batch_size", f"`global_batch_size` is {total}, and `micro_batch_size` {micro} does not divide it."
        )
    said = "global_batch_size" if total is not None else ""
    draft.set("train.gradient_accumulation_steps", 1 if total is None else int(total // micro), said)
    if total is not None:
        draft.explain("global_batch_size", "for one process; with N of them, divide the steps by N")
    if source.has("save_steps"):
        draft.set("train.save_steps", source.number("save_steps"), "save_steps")
        draft.set("train.save_strategy", "steps", "save_steps")
    elif source.has("save_epochs"):
        if source.number("save_epochs") <= 0:
            source.wrong("save_epochs", source.get("save_epochs"), "a number above 0")
        share = source.number("save_epochs") / (source.number("num_train_epochs") or 3)
        draft.set("train.save_steps", share, "save_epochs")
        draft.set("train.save_strategy", "steps", "save_epochs")
    else:
        draft.set("train.save_strategy", "no", comment="as LLaMA-Factory: the end of the run alone is saved")
    shared.resumed(draft, source)


def _optimizer(draft: Draft, source: Source) -> None:
    name, given = _plugin(source, "optim_config", {"adamw": (*_ADAMW, "betas", "fused", "foreach")})
    draft.set("train.optim", "adamw_torch", "optim_config" if name else "", "" if name else "LLaMA-Factory's default")
    if "lr" in given:
        draft.values["train"].pop("learning_rate", None)
        draft.explain("learning_rate", "optim_config.lr says it")
    if "weight_decay" not in given:
        comment = "LLaMA-Factory's default, there for norms and biases too"
        draft.set("train.weight_decay", 0.0 if name else 0.01, comment="" if name else comment)
    for theirs, ours in _ADAMW.items():
        if theirs in given:
            draft.set(f"train.{ours}", given[theirs], "optim_config")
    betas = given.get("betas", ())
    if not isinstance(betas, (list, tuple)) or len(betas) not in (0, 2):
        source.wrong(("optim_config", "betas"), betas, "two numbers")
    for ours, value in zip(("adam_beta1", "adam_beta2"), betas, strict=False):
        draft.set(f"train.{ours}", value, "optim_config")
    if source.has("lr_scheduler_config"):
        source.refuse(
            ("lr_scheduler_config", "name"),
            "`lr_scheduler_config` names a schedule that v1 of LLaMA-Factory does not have yet. Take it out, and say "
            "tether.train.lr_scheduler_type=cosine.",
        )
    draft.set("train.lr_scheduler_type", "constant", comment="LLaMA-Factory's default")


def _sharding(draft: Draft, source: Source) -> None:
    name, given = _plugin(source, "dist_config", {**_SHARDED, "none": ()})
    for key in ("cp_size", "mp_replicate_size"):
        if as_number(given.get(key, 1)) != 1:
            source.refuse(
                ("dist_config", key),
                f"`dist_config.{key}` is {given[key]}; sequences are not spread over devices. Set it to 1.",
            )
    if name == "deepspeed":
        draft.set("train.deepspeed", given.get("config_file"), "dist_config")
    elif name == "fsdp2":
        offload = {"offload_params": True} if given.get("offload_params") else {}
        shared.sharded(draft, {"version": 2, **offload}, ["dist_config"])


RULES: dict[str, Callable[[Draft, Source], None]] = {
    "objective": _objective,
    "model": _model,
    "adapter": _adapter,
    "data": _data,
    "precision": _precision,
    "steps": _steps,
    "optimizer": _optimizer,
    "sharding": _sharding,
}
