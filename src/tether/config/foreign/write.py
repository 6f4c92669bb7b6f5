"""What a conversion looks like: the run file with comments where something was decided, and the table of all keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tether.config.document import write_document
from tether.config.foreign.convert import Conversion
from tether.config.foreign.table import MARKS
from tether.config.sections import SHORT_FORMS
from tether.redact import masked

_WIDE, _NARROW = 34, 24


def run_file_text(conversion: Conversion) -> str:
    """The run file that a conversion stands for; reading it gives the same run."""
    comments = dict(conversion.comments)
    for fate in conversion.fates:
        if fate.mark == "convertible" and fate.reason:
            for target in fate.became[:1]:
                comments.setdefault(target, f"{fate.key}: {fate.reason}")
    lines = [f"# Converted from {conversion.path.name}, a file of {conversion.tool.name}."]
    if conversion.resume:
        where = "" if conversion.resume in ("last", "auto") else f"={conversion.resume}"
        lines.append(f"# It goes on from a checkpoint: tether train … --resume{where}")
    for name, value in conversion.values.items():
        if name in SHORT_FORMS and isinstance(value, dict) and value.keys() == {SHORT_FORMS[name]}:
            key = SHORT_FORMS[name]
            lines += _leaf(name, value[key], comments.get(f"{name}.{key}", ""), "")
        elif isinstance(value, dict) and value:
            lines.append(f"{name}:")
            for key, inner in value.items():
                lines += _leaf(key, inner, comments.get(f"{name}.{key}", ""), "  ")
        else:
            lines += _leaf(name, value, comments.get(name, ""), "")
    return "\n".join(lines) + "\n"


def _leaf(name: str, value: Any, comment: str, pad: str) -> Iterator[str]:
    if comment:
        yield f"{pad}# {comment}"
    several = isinstance(value, list) and any(isinstance(one, dict) for one in value)
    if isinstance(value, (list, dict)) and not several:
        first, *more = write_document(value, flow=True).splitlines()
        yield from (f"{pad}{name}: {first}", *(f"{pad}  {line.strip()}" for line in more))
    else:
        yield from (pad + line for line in write_document({name: value}).splitlines())


def fate_lines(conversion: Conversion) -> list[str]:
    """The table of what became of every key, a line each, with what the tool sets by default after them."""
    counts = Counter(fate.mark for fate in conversion.fates)
    said = ", ".join(f"{counts[mark]} {mark}" for mark in MARKS if counts[mark])
    lines = [f"{conversion.tool.name}: {conversion.path}, {len(conversion.fates)} keys: {said}"]
    rows = []
    for fate in conversion.fates:
        became = ", ".join(dict.fromkeys(fate.became)) or ("–" if fate.mark == "note" else "")
        there = f"{conversion.tool.name} {fate.there}" if fate.there else ""
        why = ". ".join(filter(None, (fate.reason, there)))
        rows.append((f"{fate.key}: {_short(fate.value)}", fate.mark, became, why))
    for target, comment in conversion.defaults.items():
        rows.append(("(default)", "", f"{target}: {_short(_at(conversion.values, target))}", comment))
    widths = [min(max((len(row[place]) for row in rows), default=0), _WIDE) for place in range(3)]
    for row in rows:
        lines.append(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        )
    return ["  " * (number > 0) + line for number, line in enumerate(lines)]


def _at(values: Any, target: str) -> Any:
    for part in target.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _short(value: Any) -> str:
    text = "true" if value is True else "false" if value is False else "" if value is None else masked(str(value))
    return text if len(text) <= _NARROW else text[: _NARROW - 1] + "…"
