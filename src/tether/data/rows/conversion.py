"""Which format rows have, and rows of a format as rows with TRL's columns. Called by `sources` and `schema`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tether.data.rows.columns import TEXTS
from tether.data.rows.fields import FieldFault, Reading, own_part, with_image_parts
from tether.data.rows.formats import FORMATS, KEPT, LABELS, Format, Row
from tether.data.rows.values import Faults
from tether.errors import ConfigError, DataError
from tether.types import Kind


def detected(columns: Iterable[str], kind: Kind) -> Format | None:
    """The format of columns that can be no other; None where they are TRL's already, or where several fit.

    Example:
        >>> detected(["conversations", "chosen", "rejected"], "pair").name
        'sharegpt'
        >>> detected(["question", "chosen", "rejected"], "pair") is None
        True
    """
    found = set(columns)
    if "conversations" in found and not found & {"prompt", "messages", "text"}:
        name = "sharegpt"
    elif kind == "pair" and {"messages", "rejected"} <= found and not found & {"chosen", "prompt"}:
        name = "messages_rejected"
    else:
        return None
    return FORMATS[name] if kind in FORMATS[name].answers else None


def reads(layout: Format, rows: Iterable[Row], kind: Kind) -> bool:
    """Whether a format reads rows as a kind."""
    try:
        return bool(convert(rows, layout, kind, name="rows"))
    except (ConfigError, DataError):
        return False


def fitting(row: Row, kind: Kind, is_sound: Callable[[Row], bool] = lambda read: True) -> str | None:
    """The name of the format that reads a row and leaves least of it unread; None where none does.

    Args:
        row: as it was given.
        kind: what it is to be read as.
        is_sound: whether a row that a format has read can be used; what is wrong in any format is no matter of it.

    Example:
        >>> fitting({"instruction": "Add.", "input": "2 + 2", "chosen": "4", "rejected": "5"}, "pair")
        'alpaca'
    """
    held = {name: value for name, value in row.items() if value not in (None, "", [])}
    best: tuple[int, str] | None = None
    for layout in FORMATS.values():
        if not reads(layout, [held], kind):
            continue
        [done] = convert([held], layout, kind, name="rows")
        if not is_sound(done):
            continue
        left = sum((name in held and name not in TEXTS) or name.endswith("(of the source)") for name in done)
        if best is None or left < best[0]:
            best = left, layout.name
    return best and best[1]


def convert(rows: Iterable[Row], layout: Format, kind: Kind, *, name: str, first: int = 0) -> list[dict[str, Any]]:
    """Turn rows into rows with TRL's columns.

    Args:
        rows: plain dictionaries.
        layout: their format.
        kind: what they are to be read as.
        name: what to call them in messages.
        first: number of the first row, from 0.

    Returns:
        As many rows, in order. Columns that the format does not read stay beside TRL's, so that they can be listed.

    Raises:
        ConfigError: the format has no such kind.
        DataError: fields are not what the format needs; the message names rows and fields.
    """
    build, as_pair = layout.answers.get(kind), layout.answers.get("pair") if kind == "unpaired" else None
    if build is None and as_pair is None:
        raise ConfigError(
            f"{name}: rows of the format `{layout.name}` cannot be read as `{kind}`; they can be read as "
            f"{', '.join(f'`{one}`' for one in layout.answers)}."
        )
    faults, converted, total = Faults(), [], 0
    for total, row in enumerate(rows, 1):
        try:
            reading = Reading(row)
            # Pairs are read as labelled completions, too, two each.
            paired = as_pair if build is None or (row.get("rejected") is not None and LABELS.isdisjoint(row)) else None
            done = _beside_prompt({"prompt": layout.prompt(reading), **(paired or build)(reading)})  # type: ignore[misc]
        except FieldFault as fault:
            faults.add(first + total, str(fault))
            continue
        done |= {column: reading[column] for column in KEPT if reading.get(column) not in (None, "", [])}
        converted.append(done | reading.unread(done))
    if faults.total:
        raise DataError(faults.message(f"{name} (format {layout.name})", total))
    return with_image_parts(converted)


def _beside_prompt(done: dict[str, Any]) -> dict[str, Any]:
    """A row whose answers hold what they have beyond the prompt, of which formats let them repeat the messages."""
    prompt = done["prompt"]
    for name in ("chosen", "rejected", "completion"):
        if isinstance(prompt, list) and isinstance(done.get(name), list):
            done[name] = own_part(name, done[name], prompt)
    return done
