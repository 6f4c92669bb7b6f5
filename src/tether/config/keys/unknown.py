"""A sentence about a key that a run file does not have; needs neither the configurations nor torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from tether.config.document import KeyPath, dotted

# What transformers, TRL and other tools call keys of a run file.
_OTHER_NAMES = {
    "attn_implementation": "model.attention",
    "device_map": "model.device",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantization: 4bit",
    "load_in_8bit": "model.quantization: 8bit",
    "quantization_config": "model.quantization",
    "tokenizer_name": "model.tokenizer",
    "base_model": "model",
    "lora_model_dir": "model.adapter",
    "adapter_name_or_path": "model.adapter",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target",
    "target_modules": "lora.target",
    "peft_config": "lora",
    "use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
    "init_lora_weights": "lora.init",
}


def unknown(
    path: KeyPath,
    known: Iterable[str],
    elsewhere: Mapping[str, str],
    train: Iterable[str],
    retired: Mapping[str, str],
) -> str:
    """A sentence about a key that no section has, with the nearest one that exists.

    Args:
        path: of the key.
        known: keys that exist beside it.
        elsewhere: key to dotted path, of every key inside a section.
        train: keys that `train` names itself.
        retired: names that options had before, each with what to do.
    """
    key, parent = str(path[-1]), path[:-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if key in retired:
        hint = retired[key]
    elif near:
        hint = f"Did you mean `{dotted((*parent, near[0]))}`?"
    elif key in elsewhere:
        hint = f"It belongs in `{elsewhere[key]}`."
    elif far := difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.8):
        hint = f"Did you mean `{elsewhere[far[0]]}`?"
    elif key in _OTHER_NAMES:
        hint = f"It is called `{_OTHER_NAMES[key]}` here."
    elif parent == ("train",):
        hint = f"Allowed are {', '.join(train)}, and the fields of the trainer's configuration."
    else:
        hint = f"Allowed are {', '.join(known)}."
    return f"`{dotted(path)}` is not known. {hint}"
