"""What can be said of a run file without torch: that it is not there, is not YAML, or has a key that does not exist.

The keys are in keys.json beside this file, which `python -m tether.config.keys.page` writes; a test compares them with
the configurations. What this lets through, `load_run_file` checks whole.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tether.config.document import KeyPath, beginning, dotted, read_document
from tether.errors import ConfigError

KEYS = Path(__file__).with_name("keys.json")
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


def refuse_at_once(path: Path, overrides: Sequence[str] = ()) -> None:
    """Refuse a run file for what a look at its keys tells; a file of another tool is let through.

    Args:
        path: the file.
        overrides: as for `load_run_file`.

    Raises:
        ConfigError: in the words of `load_run_file`.
    """
    path = path.expanduser()
    values, lines = read_document(path)
    if not {"model", "data"} <= values.keys():
        return
    keys = json.loads(KEYS.read_text(encoding="utf-8"))
    found: list[tuple[KeyPath, str]] = []
    for key in _keys(values):
        known = beginning(key, lines)
        found.append((key, f"{path}, line {lines[known]}" if known else str(path)))
    for override in overrides:
        name, equals, _ = override.partition("=")
        parts = tuple(name.strip().split("."))
        if equals and all(parts):
            # A section that an override brings has no line, and is not what the override names.
            found.append((parts[:1], f"override '{override}'" if len(parts) == 1 else str(path)))
            found += [(parts[:2], f"override '{override}'")] if len(parts) > 1 else []
    if any(override.startswith("objective") for override in overrides):
        found = [one for one in found if one[0][0] != "train"]  # which fields there are hangs on the loss
    algorithm = keys["losses"].get(loss_in(values), "dpo")
    for key, place in found:
        sentence = _problem(key, algorithm, keys)
        if sentence:
            raise ConfigError(f"{place}: {sentence}")


def _keys(values: dict[str, Any]) -> list[KeyPath]:
    """Keys of the file and of its sections."""
    found: list[KeyPath] = []
    for name, section in values.items():
        found.append((name,))
        found += [(name, inner) for inner in section] if isinstance(section, dict) else []
    return found


def loss_in(values: dict[str, Any]) -> str:
    """The loss of a run file that is not checked yet; of several, and of none, the ordinary one."""
    section = values.get("objective")
    loss = section.get("loss") if isinstance(section, dict) else None
    return loss if isinstance(loss, str) else "sigmoid"


def _problem(key: KeyPath, algorithm: str, keys: dict[str, Any]) -> str:
    """The sentence about a key that does not exist; empty for one that does, or of which the configuration decides."""
    sections, own, retired = keys["sections"], keys["train"][algorithm], keys["retired"]
    fields = own["fields"]
    elsewhere = {name: f"train.{name}" for name in fields}
    for section, names in sections.items():
        elsewhere |= {name: f"{section}.{name}" for name in names}
    if len(key) == 1:
        return "" if key[0] in keys["file"] else unknown(key, keys["file"], elsewhere, sections["train"], retired)
    section, name = str(key[0]), str(key[1])
    if section not in sections or section == "objective":
        return ""
    known = [*sections["train"], *fields] if section == "train" else sections[section]
    if name in known or (section == "train" and name in own["said_elsewhere"]):
        return ""
    return unknown(key, known, elsewhere, sections["train"], retired)


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
