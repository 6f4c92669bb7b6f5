"""What LLaMA-Factory trains of a model: an adapter, all of it, some layers; of one that sees images, not its tower."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tether.config.document import KeyPath
from tether.config.foreign.draft import Draft, Source
from tether.config.foreign.rules import shared
from tether.errors import ConfigError
from tether.models.load import load_config

_FREEZE = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
# Parts of models that see images, as transformers names them: the tower, what leads from it to the text, the text.
_PARTS = {
    "freeze_vision_tower": r"vision_tower|vision_model|vision_encoder|visual\.(?!merger)",
    "freeze_multi_modal_projector": r"multi_modal_projector|mm_projector|connector|aligner|visual\.merger",
    "freeze_language_model": r"language_model|text_model|lm_head",
}
# Pixels of an image, by the key of `data.images`, and their defaults.
_PIXELS = {"image_max_pixels": ("max_pixels", 768 * 768), "image_min_pixels": ("min_pixels", 32 * 32)}
_PROCESSOR = {"image_do_pan_and_scan": "do_pan_and_scan", "crop_to_patches": "crop_to_patches"}


def adapter(draft: Draft, source: Source) -> None:
    """`finetuning_type`, with all that is of it."""
    kind = source.one_of("finetuning_type", ("lora", "full", "freeze", "oft"), "lora")
    hidden = _frozen_towers(draft, source)
    if kind == "freeze":
        _some_layers(draft, source)
    elif kind == "full":
        draft.note("finetuning_type", "all of the model trains")
    for key in _FREEZE if kind != "freeze" else ():
        draft.note(key, f"of finetuning_type: freeze, and it is {kind}")
    if kind != "lora" and hidden:
        draft.set("model.freeze", [hidden], _tower_key(source))
    continued = _continued(draft, source)
    lora = {
        "r": (source.get("lora_rank", 8), "lora_rank"),
        "lora_alpha": (source.get("lora_alpha", 2 * (source.number("lora_rank") or 8)), "lora_alpha"),
        "lora_dropout": (source.get("lora_dropout"), "lora_dropout"),
        "use_rslora": (source.get("use_rslora"), "use_rslora"),
        "use_dora": (source.get("use_dora"), "use_dora"),
        "modules_to_save": (source.names("additional_target"), "additional_target"),
        "target_modules": (_all_linear(source.names("lora_target")), "lora_target"),
    }
    if source.flag("pissa_init"):
        rounds = source.number("pissa_iter", 16)
        if not isinstance(rounds, int) or (rounds < 1 and rounds != -1):
            source.wrong("pissa_iter", rounds, "a whole number from 1, or -1 for the exact decomposition")
        lora["init_lora_weights"] = ("pissa" if rounds == -1 else f"pissa_niter_{rounds}", "pissa_init")
        if "pissa_iter" in draft.fates:
            draft.fates["pissa_iter"].became.append("lora.init")
    said = {name: (value, key if source.has(key) else "") for name, (value, key) in lora.items()}
    if hidden:
        said["exclude_modules"] = (f".*({hidden}).*", _tower_key(source))
    if kind == "oft":
        _oft(draft, source)
    if kind != "lora" or (continued and not source.flag("create_new_adapter")):
        why = "the adapter that is named is continued" if continued else f"finetuning_type is {kind}"
        for _, key in [*lora.values(), (None, "pissa_iter")]:
            draft.note(key, why)
        return
    if "finetuning_type" in draft.fates:
        draft.fates["finetuning_type"].became.append("lora")
    shared.adapter(draft, said)


def _continued(draft: Draft, source: Source) -> bool:
    """`adapter_name_or_path`; returns whether it names one."""
    names = source.names("adapter_name_or_path") or []
    if not names:
        return False
    parent = Path(source.text("adapter_folder", ""))
    folders = [str(parent / name) for name in names] if source.has("adapter_folder") else names
    draft.set("model.adapter", folders[0] if len(folders) == 1 else folders, "adapter_name_or_path")
    *first, last = folders
    new = source.flag("create_new_adapter")
    if first:
        frozen = ", ".join(folders if new else first)
        draft.explain(
            "adapter_name_or_path",
            f"{frozen}: frozen beneath the one that trains, which gives the same sum; there merged in memory, so that "
            "what is saved fits no model on disk",
        )
    if source.text("stage", "sft") in ("dpo", "kto"):
        continued_reference(draft, "adapter_name_or_path", "" if new else their_reference(first, last))
    return True


def continued_reference(draft: Draft, key: str, theirs: str) -> None:
    """The reference of a model that starts with adapters, and how to have LLaMA-Factory's own where that is another."""
    draft.set("reference.meaning", "start", key, theirs)
    draft.explain(key, "the reference is the model as it starts, adapters included")
    draft.explain(key, theirs)


def their_reference(first: list[str], last: str) -> str:
    """What LLaMA-Factory compares with where the last adapter goes on training, and how to have that."""
    theirs = f"LLaMA-Factory's own reference is the model without {last}"
    if not first:
        return f"{theirs}; reference: base gives that"
    if len(first) == 1:
        return f"{theirs}; reference: {{adapter: {first[0]}}} gives that"
    return f"{theirs}; merge {', '.join(first)} first (tether merge), then reference: base gives that"


def _all_linear(names: list[str] | None) -> Any:
    return "all-linear" if names in (None, ["all"]) else names


def _oft(draft: Draft, source: Source) -> None:
    draft.set("peft.type", "oft", "finetuning_type")
    rank = source.number("oft_rank", 0)
    draft.set("peft.r", rank, "oft_rank" if source.has("oft_rank") else "")
    draft.set("peft.oft_block_size", 0 if rank else source.number("oft_block_size", 32), "oft_block_size")
    draft.set("peft.target_modules", _all_linear(source.names("oft_target")), "oft_target")
    if source.number("module_dropout") and shared.disables_dropout(draft):
        draft.note("module_dropout", "every dropout is switched off by this trainer, here as there (disable_dropout)")
    elif source.number("module_dropout"):
        draft.set("peft.module_dropout", source.number("module_dropout"), "module_dropout")


def _configuration(source: Source) -> Any:
    """The model's own configuration, read once; no weights are read.

    Raises:
        ConfigError: there is none that can be read.
    """
    if "configuration" not in source.looked_up:
        try:
            source.looked_up["configuration"] = load_config(
                source.text("model_name_or_path") or source.text("model"),
                revision=source.text("model_revision"),
                trust_remote_code=source.flag("trust_remote_code"),
            )
        except ConfigError as error:
            source.looked_up["configuration"] = error
    found = source.looked_up["configuration"]
    if isinstance(found, ConfigError):
        raise found
    return found


def _tower_key(source: Source) -> str:
    return next((key for key in _PARTS if source.has(key)), "")


def _sees(source: Source, key: str) -> bool:
    """Whether the model sees images; where that cannot be found out, and no key asks: not.

    Raises:
        ConfigError: a key asks, and its configuration cannot be read.
    """
    try:
        return getattr(_configuration(source), "vision_config", None) is not None
    except ConfigError as error:
        if key:
            source.refuse(key, f"`{key}`: whether the model sees images is not known. {error}")
        return False


def _frozen_towers(draft: Draft, source: Source) -> str:
    """A pattern of what LLaMA-Factory leaves as it is of a model that sees images; empty for another model."""
    frozen = [pattern for key, pattern in _PARTS.items() if source.flag(key, key != "freeze_language_model")]
    sees = _sees(source, _tower_key(source) if frozen else "")
    for key in () if sees and frozen else _PARTS:
        draft.note(key, "nothing of it is frozen" if sees else "the model sees no images")
    return "|".join(frozen) if sees else ""


def images(draft: Draft, source: Source) -> None:
    """Sizes of images, and what the processor does with them."""
    given = [key for key in (*_PIXELS, *_PROCESSOR) if source.has(key) and source.get(key) is not False]
    if not _sees(source, given[0] if given else ""):
        for key in given:
            draft.note(key, "the model sees no images")
        return
    for key, (name, usual) in _PIXELS.items():
        said = key if source.has(key) else ""
        draft.set(f"data.images.{name}", source.number(key, usual), said, "" if said else "LLaMA-Factory's default")
    for key, name in _PROCESSOR.items():
        if source.flag(key):
            draft.set(f"model.processor.{name}", True, key)


def _some_layers(draft: Draft, source: Source) -> None:
    """`finetuning_type: freeze`."""
    count, key = source.number("freeze_trainable_layers", 2), "freeze_trainable_layers"
    said = key if source.has(key) else "finetuning_type" if source.has("finetuning_type") else ""
    parts, further = (source.names(name) for name in _FREEZE[1:])
    last_layers(draft, said, (key,), count, parts, further)
    for name in ("finetuning_type", *_FREEZE[1:]):
        if name != said and name in draft.fates and draft.fates[name].mark != "note":
            draft.fates[name].became.append("model.train")


def last_layers(
    draft: Draft, said: str, place: KeyPath, count: Any, parts: list[str] | None, further: list[str] | None
) -> None:
    """Only some layers train: the last ones, or the first where the number is below 0, or parts of them.

    Args:
        draft: the run file.
        said: the key that asks for it.
        place: of the number.
        count: of layers.
        parts: of them; None: all.
        further: other modules that train.
    """
    source = draft.source
    if not isinstance(count, int) or isinstance(count, bool) or count == 0:
        source.wrong(place, count, "a whole number: the last layers, or the first ones where it is below 0")
    try:
        layers = _configuration(source).get_text_config().num_hidden_layers
    except ConfigError as error:
        source.refuse(said or place, f"only some layers are to train, which needs their number. {error}")
    chosen = range(max(0, layers - count), layers) if count > 0 else range(min(-count, layers))
    patterns = [
        rf"\.{layer}\.{'' if part == 'all' else re.escape(part)}" for part in parts or ["all"] for layer in chosen
    ]
    draft.set("model.train", [*patterns, *map(re.escape, further or ())], said)
    draft.explain(said, f"{len(chosen)} of the {layers} layers train")
