"""Axolotl's keys of the model: how it is loaded, and in what it computes."""

from __future__ import annotations

from tether.config.foreign.draft import Draft, Source
from tether.config.foreign.rules import axolotl_text, shared

# Keyword of bitsandbytes to the key of `model.quantization`.
_FOUR_BITS = {
    "bnb_4bit_quant_type": "type",
    "bnb_4bit_use_double_quant": "double",
    "bnb_4bit_quant_storage": "storage",
    "bnb_4bit_compute_dtype": "compute",
}


def model(draft: Draft, source: Source) -> None:
    """The model, its revision, quantisation, device and attention; what of it trains; its text."""
    base = source.text("base_model")
    if not base:
        source.refuse("base_model", "`base_model` is missing. Name the model.")
    if source.get("base_model_config") not in (None, base):
        source.refuse("base_model_config", "`base_model_config` names another repository; a model has its own here.")
    if source.get("tokenizer_config") not in (None, base):
        draft.set("model.tokenizer", source.text("tokenizer_config"), "tokenizer_config")
    for key in ("revision_of_model", "model_revision"):
        shared.revision(draft, source, key, "base_model")
    for key, name in (("load_in_4bit", "4bit"), ("load_in_8bit", "8bit")):
        if source.flag(key):
            draft.set("model.quantization", name, key)
    if source.get("adapter") == "qlora" and not draft.get("model.quantization"):
        draft.set("model.quantization", "4bit", "adapter")
    _four_bits(draft, source)
    for key, name in (("eager_attention", "eager"), ("sdp_attention", "sdpa")):
        if source.flag(key):
            draft.set("model.attention", name, key)
    if source.has("attn_implementation"):
        shared.load_plainly(draft, "attn_implementation", source.text("attn_implementation"))
    if source.has("device_map"):
        if not isinstance(source.get("device_map"), str):
            source.wrong("device_map", source.get("device_map"), "a device, or auto")
        draft.set("model.device", source.get("device_map"), "device_map")
    if names := source.names("unfrozen_parameters"):
        if ranged := [name for name in names if name.endswith("]") and "[" in name and ":" in name]:
            source.refuse("unfrozen_parameters", f"{ranged[0]!r} is a part of a weight; whole weights train here.")
        draft.set("model.train", names, "unfrozen_parameters")
    if source.flag("freeze_mm_modules"):
        draft.set("model.freeze", ["vision|visual|projector|connector|aligner|audio|embed_vision"], "freeze_mm_modules")
    if given := source.mapping("processor_kwargs"):
        draft.set("model.processor", given, "processor_kwargs")
    for key in ("overrides_of_model_config", "model_config"):
        _changed_configuration(draft, source, key)
    _images(draft, source)
    axolotl_text.text(draft, source)


def _changed_configuration(draft: Draft, source: Source, key: str) -> None:
    """Of a model's configuration only whether its experts are balanced, which the run decides."""
    given = source.mapping(key)
    for name in given.keys() - {"output_router_logits"}:
        source.refuse(
            (key, name),
            f"`{name}` would change the model's configuration, which a run file does not. Save the model with it, and "
            "take it out.",
        )
    balanced = given.get("output_router_logits")
    if balanced is False:
        draft.set("train.router_aux_loss_coef", 0.0, key)
    elif balanced is not None:
        draft.note(key, "the loss that balances experts is on where the model has a weight for it")


def _images(draft: Draft, source: Source) -> None:
    """`image_size`: a square with black beside the image, or a width and a height."""
    if not source.has("image_size"):
        draft.note("image_resize_algorithm", "of image_size, which is not given")
        return
    draft.set("data.images.size", source.get("image_size"), "image_size")
    said = "image_resize_algorithm" if source.has("image_resize_algorithm") else ""
    draft.set("data.images.resample", source.text("image_resize_algorithm", "bilinear"), said)


def _four_bits(draft: Draft, source: Source) -> None:
    """`bnb_config_kwargs`: weights of 4 bits in detail."""
    given = source.mapping("bnb_config_kwargs")
    if given and draft.get("model.quantization") != "4bit":
        draft.note("bnb_config_kwargs", "of weights of 4 bits, which are not asked for")
        return
    for name in given.keys() - _FOUR_BITS.keys():
        source.refuse(("bnb_config_kwargs", name), f"`{name}` is not read; known are {', '.join(_FOUR_BITS)}.")
    if given:
        details = {_FOUR_BITS[name]: value for name, value in given.items() if value is not None}
        draft.values["model"]["quantization"] = {}
        for name, value in details.items():
            draft.set(f"model.quantization.{name}", value, "bnb_config_kwargs")


def precision(draft: Draft, source: Source) -> None:
    """`bf16`, `tf32` and the type of the weights."""
    bf16 = source.get("bf16", "auto")
    if bf16 == "full":
        draft.set("model.dtype", "bfloat16", "bf16")
        draft.set("train.bf16", False, "bf16")
    elif isinstance(bf16, bool):
        draft.set("train.bf16", bf16, "bf16")
        if bf16:
            lost = "" if source.has("adapter") else "; small updates of them are lost, which float32 would keep"
            draft.set("model.dtype", "bfloat16", "bf16", f"Axolotl's weights are bfloat16 then{lost}")
        elif not any(source.flag(key) for key in ("fp16", "load_in_8bit", "float16", "bfloat16")):
            draft.set("model.dtype", "float32", "bf16")
    elif bf16 == "auto":
        draft.note("bf16", "on where the device has it; on a CPU where it is measured to be faster")
    else:
        source.wrong("bf16", bf16, "auto, true, false or full")
    for key, name in (("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32")):
        if source.flag(key):
            draft.set("model.dtype", name, key)
    tf32 = source.get("tf32", "auto")
    if isinstance(tf32, bool):
        draft.set("train.tf32", tf32, "tf32")
    elif tf32 == "auto":
        draft.note("tf32", "left to torch")
    else:
        source.wrong("tf32", tf32, "auto, true or false")
