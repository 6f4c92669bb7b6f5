"""Rules that the tools have in common: adapters, objectives, sources of rows, warm-up, environment, sharding."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tether.config.document import KeyPath
from tether.config.fields import config_class, fields_under, row_of
from tether.config.foreign.draft import Draft, Source, as_number
from tether.redact import is_secret

# PEFT's names of what `lora:` has a key for.
_LORA = {
    "r": "r",
    "lora_alpha": "alpha",
    "target_modules": "target",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "init_lora_weights": "init",
    "modules_to_save": "modules_to_save",
    "target_parameters": "target_parameters",
}
# Key of a tool to the key of `model.quantization`, and its default there.
_FOUR_BITS: dict[str, tuple[str, Any]] = {
    "quantization_type": ("type", "nf4"),
    "bnb_4bit_quant_type": ("type", "nf4"),
    "double_quantization": ("double", True),
    "use_bnb_nested_quant": ("double", True),
    "bnb_4bit_quant_storage": ("storage", "uint8"),
}
# Names that TRL's script has for reward functions, and what computes the same here.
_READY_MADE: dict[str, dict[str, Any]] = {
    "think_format_reward": {"name": "think_format"},
    "get_soft_overlong_punishment": {"name": "soft_overlong", "max_length": 1280, "margin": 256},
    "accuracy_reward": {"python": "tether.trl.rewards:accuracy_reward"},
    "reasoning_accuracy_reward": {"python": "tether.trl.rewards:reasoning_accuracy_reward"},
}
# Attention of transformers that a model can be loaded with; kernels are chosen by Tether itself.
PLAIN_ATTENTION = ("eager", "sdpa")


def objective(draft: Draft, loss: Any, key: str, options: dict[str, tuple[Any, str]]) -> None:
    """The section `objective`: the loss, and its options.

    Args:
        draft: the run file.
        loss: as a run file names it.
        key: that says it.
        options: key of the section to its value and the foreign key that says it, empty for a default. Those that the
            loss does not take are notes.
    """
    draft.set("objective.loss", loss, key)
    config, row = config_class(loss), row_of(loss)
    known = fields_under("objective", config)
    for name, (value, said_by) in options.items():
        if name not in known:
            draft.note(said_by, f"the loss {loss!r} does not take it", "has no effect with it")
            continue
        preset = row.preset.get(name) if row else None
        default = config.__dataclass_fields__[known[name]].default if preset is None else preset
        if said_by or value != default:
            draft.set(f"objective.{name}", value, said_by)


def disables_dropout(draft: Draft) -> bool:
    """Whether the run switches every dropout off."""
    loss = draft.get("objective.loss", "sigmoid")
    default = config_class(loss).__dataclass_fields__["disable_dropout"].default
    return bool(draft.get("train.disable_dropout", default))


def adapter(draft: Draft, options: dict[str, tuple[Any, str]]) -> None:
    """A new LoRA adapter, under `lora` where that has a key for everything, else under `peft`.

    Args:
        draft: the run file; its objective is known.
        options: PEFT's name to the value and the key that says it. Without `target_modules` PEFT's choice for the
            architecture is taken.
    """
    given = {name: pair for name, pair in options.items() if pair[0] is not None and pair[0] is not False}
    if "lora_dropout" in given and disables_dropout(draft):
        value, key = given.pop("lora_dropout")
        if value:
            draft.note(key, "every dropout is switched off by this trainer, here as there (disable_dropout)")
    elif "lora_dropout" in given and not given["lora_dropout"][0]:
        del given["lora_dropout"]
    target = given.get("target_modules", (None, ""))[0]
    named = isinstance(target, list) or target == "all-linear"
    if named and given.keys() <= _LORA.keys():
        for name, (value, key) in given.items():
            draft.set(f"lora.{_LORA[name]}", value, key)
        return
    why = "" if target else "no target is named: PEFT's choice for the architecture, as there; all-linear learns more"
    draft.set("peft.type", "lora", comment=why)
    for name, (value, key) in given.items():
        draft.set(f"peft.{name}", value, key)


def load_plainly(draft: Draft, key: str, value: Any) -> None:
    """Attention: transformers' own by its name; a kernel is Tether's to choose."""
    if value in PLAIN_ATTENTION:
        draft.set("model.attention", value, key)
    else:
        draft.note(
            key, "the attention of packed rows is Tether's own, and its kernel is chosen and proved at the start"
        )


def revision(draft: Draft, source: Source, key: str, model: str) -> None:
    """A branch, tag or commit; the default branch and a folder need none."""
    value = source.text(key)
    if value is None:
        return
    if value == "main" or Path(str(source.get(model, ""))).expanduser().is_dir():
        draft.note(key, "the default branch is taken, and a folder has no revisions")
    else:
        draft.set("model.revision", value, key)


def four_bits(draft: Draft, source: Source, value: Any, key: str) -> None:
    """A detail of weights of 4 bits: a type, a type of storage, or whether scales are quantised too."""
    if draft.get("model.quantization") in (None, "8bit"):
        draft.note(key, "of weights of 4 bits, which are not asked for")
        return
    part, usual = _FOUR_BITS[key]
    if value == usual:
        draft.note(key, "as it is here")
        return
    if draft.get("model.quantization") == "4bit":
        draft.values["model"]["quantization"] = {}
    draft.set(f"model.quantization.{part}", value, key if source.has(key) else "")


def warmup(draft: Draft, source: Source) -> bool:
    """`warmup_steps` and `warmup_ratio`; transformers has one key for both. Returns whether either was given."""
    steps, share = source.number("warmup_steps"), source.number("warmup_ratio")
    if steps and share:
        source.refuse("warmup_ratio", "`warmup_ratio` and `warmup_steps` say the same thing. Leave one of them out.")
    if share is not None and not 0 <= share < 1:
        source.wrong("warmup_ratio", share, "a share from 0 to below 1")
    if steps:
        draft.set("train.warmup_steps", steps, "warmup_steps")
        draft.note("warmup_ratio", "warmup_steps says it")
    elif share is not None:
        draft.set("train.warmup_steps", share, "warmup_ratio")
    elif steps is not None:
        draft.set("train.warmup_steps", steps, "warmup_steps")
    return steps is not None or share is not None


def environment(draft: Draft, name: str, value: Any, key: str) -> None:
    """A variable that the run gets, as the tool would set it; never written down where it is a secret."""
    place = (key, name) if key == "env" else (key,)
    if is_secret(name):
        draft.source.refuse(
            place,
            f"`{'.'.join(place)}` is a secret, and files are copied and shown. Take it out, and set {name} in the "
            "environment.",
        )
    if not isinstance(value, (str, int, float)):
        draft.source.wrong(place, value, "text or a number")
    draft.set(f"env.{name}", value, key)


def nothing_to_evaluate(draft: Draft, why: str) -> None:
    """Take out what says when rows are evaluated, where there are none; the tools leave it without effect."""
    for name in ("eval_steps", "eval_strategy", "eval_on_start", "load_best_model_at_end"):
        if draft.get(f"train.{name}") not in (None, False, "no"):
            del draft.values["train"][name]
            key = draft.origins.pop(("train", name))
            draft.note(key, why)
            if key in draft.fates:
                draft.fates[key].became.clear()


def resumed(draft: Draft, source: Source) -> None:
    """The checkpoint that a file goes on from, which a command line says with `--resume`."""
    value = source.get("resume_from_checkpoint") if source.has("resume_from_checkpoint") else False
    if value is not False:
        draft.resume = "last" if value is True else str(value)
        draft.fates["resume_from_checkpoint"].became.append("--resume")


def read_whole(draft: Draft, key: str) -> None:
    """Take streaming out where a source is one JSON list, which the tools read whole as well."""
    sources = draft.get("data.train", [])
    for one in sources if isinstance(sources, list) else [sources]:
        path = Path(str(one.get("path") if isinstance(one, dict) else one)).expanduser()
        if path.suffix != ".json" or not path.is_file():
            continue
        with path.open("rb") as file:
            listed = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        if listed:
            draft.values["data"].pop("streaming", None)
            draft.values["data"].pop("buffer_size", None)
            draft.note(key, f"{path} is one JSON list, which is read whole; JSON lines (.jsonl) are streamed")
            draft.note("buffer_size", "rows are not streamed")
            for name in {key, "buffer_size"} & draft.fates.keys():
                draft.fates[name].became.clear()


def scale_of_rewards(draft: Draft) -> None:
    """`scale_rewards: true` in words."""
    value = draft.get("objective.scale_rewards")
    if isinstance(value, bool):
        draft.values["objective"]["scale_rewards"] = "group" if value else "none"


def trackers(draft: Draft, wanted: list[tuple[str, str]], name: tuple[str, str] | None) -> None:
    """`train.report_to` and `train.run_name` from the services that keys ask for."""
    if wanted:
        draft.set("train.report_to", [service for service, _ in wanted])
        for service, key in wanted:
            draft.explain(key, f"reported to {service}")
            draft.fates[key].became.append("train.report_to")
    if name is not None:
        draft.set("train.run_name", *name)


def sharded(draft: Draft, config: Mapping[str, Any], keys: list[str]) -> None:
    """FSDP, by keys that are given; a run of one process goes on without."""
    draft.set("train.fsdp", True, keys[0])
    for key in keys[1:]:
        draft.fates[key].became.append("train.fsdp")
    if config:
        draft.set("train.fsdp_config", dict(config), next((key for key in keys if "config" in key), keys[0]))
    draft.explain(keys[0], "one process holds the whole model; with several (--launch N) it is sharded")


def fsdp(draft: Draft, source: Source, keys: list[str], extra: Mapping[str, Any]) -> None:
    """The keys of FSDP that a file has, with what other keys add to its configuration."""
    given = [key for key in keys if source.has(key) and source.get(key) is not False and source.get(key) != []]
    config = source.mapping("fsdp_config") | {name: value for name, value in extra.items() if value is not None}
    if source.has("fsdp") and "offload" in str(source.get("fsdp")):
        config = {"offload_params": True, **config}
    if {"fsdp", "fsdp_config"} & set(given):
        sharded(draft, config, given)
    for key in () if {"fsdp", "fsdp_config"} & set(given) else given:
        draft.note(key, "of fsdp, which is not asked for")


def beside(source: Source, name: str) -> str | None:
    """A function `module.function` of a Python file beside the file or in the current folder, or of an installed
    module, as a run file names it; None where there is none."""
    module, _, function = name.rpartition(".")
    if not module:
        return None
    for folder in (source.path.parent, Path()):
        if (file := folder / (module.replace(".", "/") + ".py")).is_file():
            return f"{file}:{function}"
    try:
        return f"{module}:{function}" if importlib.util.find_spec(module) else None
    except ModuleNotFoundError:
        return None


def reward_function(source: Source, place: KeyPath, name: str) -> dict[str, Any]:
    """A reward by the name that TRL's script has for it, or a function of the user's own."""
    if name in _READY_MADE:
        return _READY_MADE[name]
    if (found := beside(source, name)) is None:
        source.refuse(
            place,
            f"`{place[-1]}` has {name!r}; known are {', '.join(_READY_MADE)}, and module.function of a Python file "
            "that lies beside this one, or of an installed module. A run file has more of its own (`tether: {rewards: "
            "…}`).",
        )
    return {"python": found}


def weighted(source: Source, rewards: list[dict[str, Any]], weights: Any, place: KeyPath) -> list[dict[str, Any]]:
    """Rewards with their weights, where these are given."""
    weights = [1.0] * len(rewards) if weights is None else [weights] if as_number(weights) is not None else weights
    if not isinstance(weights, list) or len(weights) != len(rewards) or any(as_number(one) is None for one in weights):
        source.wrong(place, weights, f"a list of {len(rewards)} numbers, one for each reward")
    return [
        reward | ({"weight": as_number(weight)} if as_number(weight) != 1 else {})
        for reward, weight in zip(rewards, weights, strict=True)
    ]
