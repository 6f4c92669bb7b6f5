"""LLaMA-Factory's YAML: what its keys become, with its defaults. Fields of transformers' arguments keep their names."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tether.config.fields import config_class
from tether.config.foreign.draft import Draft, Source, as_number
from tether.config.foreign.rules import llamafactory_model, shared
from tether.config.foreign.table import load_templates
from tether.config.problems import show
from tether.training import PreferenceConfig

_STAGES: dict[str, Any] = {"dpo": ["sigmoid"], "kto": "kto", "rm": "reward", "sft": "sft"}
_NOT_HERE = {"pt": "pre-training", "ppo": "PPO"}
_MIXES = ("concat", "interleave_under", "interleave_over", "interleave_once")
# Keys of files for LLaMA-Factory's other commands, and what does that here.
_NOT_TRAINING = {
    "export_dir": "To write an adapter into its model: tether merge ADAPTER --output FOLDER.",
    "infer_backend": "To talk to a model: tether chat MODEL.",
    "predict_with_generate": "To talk to a model: tether chat MODEL; to score pairs: tether eval MODEL --data ROWS.",
    "task": "Its benchmarks are not here; to score pairs: tether eval MODEL --data ROWS.",
}
_LOSSES = ("sigmoid", "hinge", "ipo", "simpo", "orpo")
_BITS = {4: "4bit", 8: "8bit"}
# Columns by the names that `dataset_info.json` has for them, and what the formats here call them.
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_SHAREGPT = {"messages": "conversations"}
_SHARED = {name: name for name in ("system", "tools", "images", "chosen", "rejected", "kto_tag")}
_TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
    "system_tag": ("system",),
}
_SWANLAB = {
    **{f"swanlab_{name}": f"SWANLAB_{name.upper()}" for name in ("project", "workspace", "mode")},
    "swanlab_logdir": "SWANLAB_LOG_DIR",
}
_INFO = "dataset_info.json"
_OF_ENTRY = (
    *("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name", "formatting", "ranking"),
    *("subset", "split", "folder", "num_samples", "columns", "tags"),
)


def configuration(source: Source) -> type[PreferenceConfig]:
    """The configuration of a stage.

    Raises:
        ConfigError: there is no such stage here.
    """
    for key, instead in _NOT_TRAINING.items():
        if source.has(key) and not source.has("dataset"):
            source.refuse(key, f"`{key}` is of a file that trains nothing. {instead}")
    stage = source.get("stage", "sft")
    if isinstance(stage, str) and stage in _NOT_HERE:
        source.refuse(
            "stage", f"`stage` is {stage!r}; {_NOT_HERE[stage]} is not here. Allowed are {', '.join(_STAGES)}."
        )
    return config_class(_STAGES[source.one_of("stage", _STAGES, "sft")])


def _objective(draft: Draft, source: Source) -> None:
    for key in ("train_on_prompt", "mask_history", "create_new_adapter", "eval_on_each_dataset", "pissa_init"):
        source.flag(key)
    stage = source.text("stage", "sft")
    options: dict[str, tuple[Any, str]] = {}
    loss: Any = {"kto": "kto", "rm": "reward", "sft": "dft" if source.flag("use_dft_loss") else "sft"}.get(stage)
    if stage == "dpo":
        if source.get("pref_loss") == "kto_pair":
            source.refuse("pref_loss", "`pref_loss` is 'kto_pair', which TRL removed; `stage: kto` reads pairs too.")
        loss, options = preference(source, _LOSSES)
    elif stage == "kto" and source.get("pref_ftx"):
        source.refuse("pref_ftx", "`pref_ftx` adds a likelihood, which KTO's trainer does not. Set it to 0.")
    if stage in ("dpo", "kto"):
        options["beta"] = (source.number("pref_beta", 0.1), "pref_beta" if source.has("pref_beta") else "")
    for name, key in (
        ("label_smoothing", "dpo_label_smoothing"),
        ("ld_alpha", "ld_alpha"),
        ("desirable_weight", "kto_chosen_weight"),
        ("undesirable_weight", "kto_rejected_weight"),
    ):
        if source.has(key):
            options[name] = (source.number(key), key)
    if source.has("simpo_gamma"):
        options["simpo_gamma"] = (source.number("simpo_gamma"), "simpo_gamma")
    key = next((key for key in ("pref_loss", "use_dft_loss", "stage") if source.has(key)), "")
    shared.objective(draft, loss, key, options)
    odds_ratio(draft, loss)
    draft.fates["stage"].became.append("objective") if "stage" in draft.fates else None
    for key in ("pref_loss", "pref_beta", "pref_ftx", "pref_bco_weight", "use_dft_loss"):
        if key in draft.fates and not draft.fates[key].became and draft.fates[key].mark != "note":
            draft.note(key, f"stage: {stage} does not read it", f"is not read under stage: {stage}")
    if stage != "sft":
        return
    if source.flag("train_on_prompt"):
        draft.set("objective.completion_only_loss", False, "train_on_prompt")
    elif source.flag("mask_history"):
        draft.set("train.turns", "last", "mask_history")
    else:
        draft.set("train.turns", "assistant", comment="LLaMA-Factory trains on the assistant's turns")


def odds_ratio(draft: Draft, loss: Any) -> None:
    """What LLaMA-Factory's ORPO says beside its loss."""
    if loss == ["sft", "odds_ratio"]:
        draft.set("reference.meaning", "none")
        draft.explain("pref_loss", "a likelihood of the answer, and the odds ratio times pref_beta")


def preference(source: Source, losses: tuple[str, ...]) -> tuple[Any, dict[str, tuple[Any, str]]]:
    """The loss of preference training, one of some, with what `pref_ftx` and `pref_bco_weight` add to it."""
    loss = source.one_of("pref_loss", losses, "sigmoid")
    share, odds = source.number("pref_ftx") or 0, source.number("pref_bco_weight") or 0
    if loss in ("orpo", "simpo") and (share or odds):
        key = "pref_ftx" if share else "pref_bco_weight"
        source.refuse(key, f"`{key}` adds to a loss with a reference, and pref_loss is {loss!r}. Set it to 0.")
    if loss == "orpo":
        beta = source.number("pref_beta", 0.1)
        return ["sft", "odds_ratio"], {
            "weights": ([1.0, beta], "pref_beta" if source.has("pref_beta") else "pref_loss")
        }
    if loss == "simpo":
        gamma = "" if source.has("simpo_gamma") else "pref_loss"
        return loss, {"cpo_alpha": (0.0, "pref_loss"), **({"simpo_gamma": (0.5, gamma)} if gamma else {})}
    names, weights = [loss], [1.0]
    if odds:
        names, weights = [*names, "bco_pair"], [1 / (1 + odds), odds / (1 + odds)]
    if share:
        names, weights = [*names, "sft"], [*weights, share]
    if len(names) == 1:
        return loss, {}
    return names, {"weights": (weights, "pref_bco_weight" if odds else "pref_ftx")}


def _reference(draft: Draft, source: Source) -> None:
    stage = source.text("stage", "sft")
    keys = [key for key in ("ref_model", "ref_model_adapters", "ref_model_quantization_bit") if source.has(key)]
    if stage not in ("dpo", "kto"):
        for key in keys:
            draft.note(key, f"stage: {stage} has no reference")
        return
    if source.has("ref_model_adapters"):
        if source.get("ref_model") not in (None, source.get("model_name_or_path")):
            source.refuse(
                "ref_model_adapters", "an adapter on another model is no reference here. Merge the two first."
            )
        draft.set("reference.adapter", source.text("ref_model_adapters"), "ref_model_adapters")
        draft.note("ref_model", "it is the model that trains, with the adapter of ref_model_adapters")
    elif source.has("ref_model"):
        draft.set("reference.model", source.text("ref_model"), "ref_model")
        if source.has("ref_model_quantization_bit"):
            _quantize(draft, source, "ref_model_quantization_bit", "reference.quantization")


def _quantize(draft: Draft, source: Source, key: str, target: str) -> None:
    bits = source.number(key)
    if bits is not None and bits not in _BITS:
        source.wrong(key, bits, "4 or 8")
    if bits is not None:
        draft.set(target, _BITS[bits], key)


def _model(draft: Draft, source: Source) -> None:
    if not source.text("model_name_or_path"):
        source.refuse("model_name_or_path", "`model_name_or_path` is missing. Name the model.")
    shared.revision(draft, source, "model_revision", "model_name_or_path")
    _quantize(draft, source, "quantization_bit", "model.quantization")
    shared.four_bits(draft, source, source.one_of("quantization_type", ("nf4", "fp4"), "nf4"), "quantization_type")
    shared.four_bits(draft, source, source.flag("double_quantization", True), "double_quantization")
    if source.flag("pure_bf16"):
        draft.set("model.dtype", "bfloat16", "pure_bf16")
        draft.set("train.bf16", False, "pure_bf16")
    if source.has("default_system"):
        draft.set("data.system", source.text("default_system"), "default_system")
    template(draft, source)
    tokens = [token for key in ("add_tokens", "add_special_tokens") for token in source.names(key) or ()]
    if tokens:
        draft.set("model.add_tokens", tokens, "add_tokens" if source.has("add_tokens") else "add_special_tokens")
    if source.get("flash_attn", "auto") != "auto":
        kind = {"disabled": "eager", "sdpa": "sdpa"}.get(str(source.get("flash_attn")), "flash")
        shared.load_plainly(draft, "flash_attn", kind)


def template(draft: Draft, source: Source) -> None:
    """`template`: what is nobody's own is taken; that of a family where the model has none."""
    name, known = source.text("template"), load_templates("llamafactory")
    if name is None:
        return
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        source.refuse(
            "template",
            f"`template` is {name!r}, which is no template of LLaMA-Factory 0.9. {hint}For the model's own, take it "
            "out; for another one, `tether.model.chat_template=FILE`.",
        )
    found = known[name]
    if found.use == "own":
        draft.note("template", "conversations are written by the model's own template, which is that one")
        return
    draft.set("model.chat_template", found.template if found.use == "use" else f"fallback:{found.template}", "template")
    where = "written so whatever the model has" if found.use == "use" else "written so where the model has no template"
    draft.explain("template", ". ".join(filter(None, (where, found.reason))))


def _data(draft: Draft, source: Source) -> None:
    if not source.names("dataset"):
        source.refuse("dataset", "`dataset` is missing. Name one of dataset_info.json.")
    draft.set("data.train", _sets(draft, source, "dataset"), "dataset")
    draft.fates["dataset"].reason = f"as {_INFO} says"
    each = source.flag("eval_on_each_dataset")
    if source.names("eval_dataset"):
        found = _sets(draft, source, "eval_dataset", named=each)
        draft.set("data.eval", found, "eval_dataset")
    elif source.number("val_size"):
        draft.set("data.eval", {"split": source.number("val_size"), "by": "row"}, "val_size")
    else:
        shared.nothing_to_evaluate(draft, "there is nothing to evaluate: neither eval_dataset nor val_size is given")
    if source.flag("streaming"):
        size = source.number("buffer_size", 16384)
        draft.set("data.buffer_size", size, "buffer_size" if source.has("buffer_size") else "")
        shared.read_whole(draft, "streaming")
    else:
        draft.note("buffer_size", "rows are not streamed")
    if source.flag("disable_shuffling"):
        draft.set("train.train_sampling_strategy", "sequential", "disable_shuffling")
    if "dataset_dir" in draft.fates:
        draft.fates["dataset_dir"].became.append("data.train")


def _sets(draft: Draft, source: Source, key: str, *, named: bool = False) -> Any:
    names = source.names(key) or []
    folder = source.text("dataset_dir", "data")
    if folder == "ONLINE" or folder.startswith("REMOTE:"):
        if folder != "ONLINE":
            source.refuse("dataset_dir", f"`{_INFO}` of a hub repository is not fetched. Put it into a folder.")
        found: dict[str, Any] = {name: name for name in names}
    else:
        info = _information(source, Path(folder))
        found = {name: _of_information(source, key, Path(folder), name, info) for name in names}
    if (most := source.number("max_samples")) is not None:
        found = {
            name: {**(one if isinstance(one, dict) else {"path": one}), "first": most} for name, one in found.items()
        }
        if "max_samples" in draft.fates and "data.train" not in draft.fates["max_samples"].became:
            draft.fates["max_samples"].became.append("data.train")
    if named:
        return found
    found = _interleaved(draft, source, found) if key == "dataset" else found
    made = list(found.values())
    return made if len(made) > 1 else made[0]


def _interleaved(draft: Draft, source: Source, found: dict[str, Any]) -> dict[str, Any]:
    """Sets with their shares: rows are drawn from each by its probability until the first set has no more, or all."""
    strategy = source.one_of("mix_strategy", _MIXES, "concat")
    if strategy in ("concat", "interleave_once"):
        draft.note("interleave_probs", "of mix_strategy: interleave_under or interleave_over, which is not asked for")
        if strategy != "concat":
            draft.note("mix_strategy", "every row once, in a random order")
        return found
    over = strategy == "interleave_over"
    given = source.get("interleave_probs")
    given = given.split(",") if isinstance(given, str) else given or [1] * len(found)
    shares = [as_number(one) for one in given] if isinstance(given, list) else []
    if len(shares) != len(found) or not all(share is not None and share > 0 for share in shares):
        source.wrong("interleave_probs", source.get("interleave_probs"), f"{len(found)} numbers above 0, one for a set")
    for name in ("mix_strategy", "interleave_probs"):
        if name in draft.fates:
            draft.fates[name].became.append("data.train")
    bound = "until each row was taken" if over else "none twice"
    draft.explain("mix_strategy", f"rows of each set from the first on, by these shares, {bound}; there they are drawn")
    return {
        name: {
            **(rows if isinstance(rows, dict) else {"path": rows}),
            "fraction": share,
            **({"repeat": True} if over else {}),
        }
        for (name, rows), share in zip(found.items(), shares, strict=True)
    }


def _information(source: Source, folder: Path) -> dict[str, Any]:
    path = folder.expanduser() / _INFO
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        source.refuse("dataset_dir", f"{path} cannot be read ({error}). LLaMA-Factory looks for its data sets there.")
    if not isinstance(found, dict):
        source.refuse("dataset_dir", f"{path} holds no mapping of names to data sets.")
    return found


def _of_information(source: Source, key: str, folder: Path, name: str, info: dict[str, Any]) -> Any:
    where = f"the data set {name!r} of {folder / _INFO}"
    if name not in info:
        source.refuse(key, f"{where} is not there; there are {', '.join(map(str, info))}.")
    _check_entry(source, key, where, info[name])
    entry = {key: value for key, value in info[name].items() if value is not None}
    if entry.get("num_samples"):
        source.refuse(key, f"{where} has `num_samples`, and which ones LLaMA-Factory draws is not told. Take it out.")
    odd = [part for part in ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name") if part in entry]
    if odd and not entry.keys() & {"hf_hub_url", "file_name"}:
        source.refuse(key, f"{where} is found by `{odd[0]}`, which is not read. Give `hf_hub_url` or `file_name`.")
    hub = entry.get("hf_hub_url")
    if hub is None and "file_name" not in entry:
        source.refuse(key, f"{where} has neither `file_name` nor `hf_hub_url`.")
    kind = entry.get("formatting", "alpaca")
    if kind not in ("alpaca", "sharegpt", "openai"):
        source.refuse(key, f"{where} has the formatting {kind!r}; known are alpaca, sharegpt and openai.")
    labels = _labels(source, key, where, entry.get("tags") or {})
    ours = {**(_ALPACA if kind == "alpaca" else _SHAREGPT), **_SHARED}
    columns = entry.get("columns") or {}
    if strange := sorted(columns.keys() - ours.keys()):
        source.refuse(key, f"{where} has the column `{strange[0]}`; with {kind} there may be {', '.join(ours)}.")
    fields = {ours[name]: column for name, column in columns.items() if column and column != ours[name]}
    rows = {"path": hub or str(folder / entry["file_name"]), "format": "alpaca" if kind == "alpaca" else "sharegpt"}
    for theirs, own in (("subset", "name"), ("split", "split"), ("folder", "data_dir")):
        if hub and entry.get(theirs) and (own, entry[theirs]) != ("split", "train"):
            rows[own] = entry[theirs]
    return {**rows, **({"fields": fields} if fields else {}), **labels}


def _check_entry(source: Source, key: str, where: str, entry: Any) -> None:
    """What `dataset_info.json` says of a data set is what it must be, and nothing but a slip of the pen is unknown."""
    kinds: dict[str, type] = {"columns": dict, "tags": dict, "file_name": str}
    if not isinstance(entry, dict):
        source.refuse(key, f"{where} is {show(entry)}; it must be a mapping.")
    for part, kind in kinds.items():
        if entry.get(part) is not None and not isinstance(entry[part], kind):
            wanted = "a mapping" if kind is dict else "text"
            source.refuse(key, f"{where} has `{part}`: {show(entry[part])}; it must be {wanted}.")
    for part in entry.keys() - set(_OF_ENTRY):
        if near := difflib.get_close_matches(str(part), _OF_ENTRY, n=1):
            source.refuse(key, f"{where} has `{part}`, which LLaMA-Factory ignores. Did you mean `{near[0]}`?")


def _labels(source: Source, key: str, where: str, tags: dict[str, Any]) -> dict[str, Any]:
    """`roles` and `message_keys` of a source, from tags that are not found by themselves."""
    roles: dict[str, str] = {}
    keys: dict[str, str] = {}
    for name, value in tags.items():
        if value is None or value in _TAGS.get(name, ()):
            continue
        if name not in _TAGS or not isinstance(value, str):
            source.refuse(key, f"{where} has the tag `{name}: {value}`; known are {', '.join(_TAGS)}. Correct it.")
        if name in ("role_tag", "content_tag"):
            keys[name.removesuffix("_tag")] = value
        else:
            roles[value] = {"observation_tag": "tool", "function_tag": "function_call"}.get(name, name[:-4])
    return {**({"roles": roles} if roles else {}), **({"message_keys": keys} if keys else {})}


def _steps(draft: Draft, source: Source) -> None:
    shared.warmup(draft, source)
    said = "cutoff_len" if source.has("cutoff_len") else ""
    draft.set("train.max_length", source.number("cutoff_len", 2048), said, "" if said else "LLaMA-Factory's default")
    if source.flag("disable_gradient_checkpointing"):
        draft.set("train.gradient_checkpointing", False, "disable_gradient_checkpointing")
    if (patience := source.number("early_stopping_steps")) is not None:
        draft.set("callbacks.early_stopping.patience", patience, "early_stopping_steps")
    shared.resumed(draft, source)
    # LLaMA-Factory writes the loss every 500 steps by default; that changes nothing in training, so ours is kept.


def _tracking(draft: Draft, source: Source) -> None:
    """SwanLab, beside what `report_to` names."""
    if not source.flag("use_swanlab"):
        for key in (*_SWANLAB, "swanlab_run_name"):
            draft.note(key, "of use_swanlab, which is not asked for")
        return
    others = [one for one in source.names("report_to") or () if one != "none"]
    draft.values["train"].pop("report_to", None)
    draft.set("train.report_to", [*others, "swanlab"], "use_swanlab")
    for key, variable in _SWANLAB.items():
        if source.has(key):
            shared.environment(draft, variable, source.get(key), key)
    if source.has("swanlab_run_name"):
        draft.set("train.run_name", source.text("swanlab_run_name"), "swanlab_run_name")


def _sharding(draft: Draft, source: Source) -> None:
    shared.fsdp(draft, source, ["fsdp", "fsdp_config"], {})


RULES: dict[str, Callable[[Draft, Source], None]] = {
    "objective": _objective,
    "model": _model,
    "adapter": llamafactory_model.adapter,
    "images": llamafactory_model.images,
    "reference": _reference,
    "data": _data,
    "steps": _steps,
    "tracking": _tracking,
    "sharding": _sharding,
}
