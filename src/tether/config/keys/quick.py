"""What can be said of a run file without torch: that it is not there, is not YAML, or has a key that does not exist.

The keys are in keys.json beside this file, which `python -m tether.config.keys.page` writes; a test compares them with
the configurations. What this lets through, `load_run_file` checks whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tether.config.document import KeyPath, read_document
from tether.config.keys.unknown import unknown
from tether.errors import ConfigError

KEYS = Path(__file__).with_name("keys.json")


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
        line = next((lines[key[:length]] for length in range(len(key), 0, -1) if key[:length] in lines), None)
        found.append((key, str(path) if line is None else f"{path}, line {line}"))
    for override in overrides:
        name, equals, _ = override.partition("=")
        parts = tuple(name.strip().split("."))
        if equals and all(parts):
            # A section that an override brings has no line, and is not what the override names.
            found.append((parts[:1], f"override '{override}'" if len(parts) == 1 else str(path)))
            found += [(parts[:2], f"override '{override}'")] if len(parts) > 1 else []
    if any(override.startswith("objective") for override in overrides):
        found = [one for one in found if one[0][0] != "train"]  # which fields there are hangs on the loss
    algorithm = _algorithm(values, keys)
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


def _algorithm(values: dict[str, Any], keys: dict[str, Any]) -> str:
    section = values.get("objective")
    loss = section.get("loss") if isinstance(section, dict) else None
    return keys["losses"].get(loss, "dpo") if isinstance(loss, str) else "dpo"


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
