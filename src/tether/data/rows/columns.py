"""Which columns rows of each kind have, and which of a data set are read. Called by `schema`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from datasets import ClassLabel, Dataset

from tether.errors import DataError
from tether.types import Kind

KINDS: tuple[Kind, ...] = ("pair", "ranked", "unpaired", "completion", "prompt_only")
# Numbers that belong to a row, see `Preference.values`.
VALUES = ("label", "weight", "margin")
# What a row of each kind must have; the first layout whose columns are all there is read.
LAYOUTS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "pair": (("chosen", "rejected"),),
    "ranked": (("prompt", "completions"),),
    "unpaired": (("prompt", "completion", "label"), ("chosen", "rejected")),
    "completion": (("prompt", "completion"), ("messages",), ("text",)),
    "prompt_only": (("prompt",),),
}
TEXTS = ("prompt", "chosen", "rejected", "completion", "completions", "messages", "text")
# What reaches the chat template of its row.
EXTRAS = ("tools", "chat_template_kwargs")
BATCH_ROWS = 1000
# Columns that change what a model sees. Images are taken out before (see `image_parts`); what is left is refused.
IMAGE_COLUMNS = ("images", "image")
_UNSUPPORTED = (*IMAGE_COLUMNS, "videos", "video", "audios", "audio")
# Which of two answers is preferred is never guessed from how a column is spelt, nor what a label means; words that say
# it are known, with the preferred one first.
_UNGUESSED = ("chosen", "rejected", "completions", "label")
_OPPOSED = (
    *(("better", "worse"), ("best", "worst"), ("good", "bad"), ("preferred", "dispreferred"), ("accepted", "refused")),
    *(("winner", "loser"), ("win", "lose"), ("positive", "negative"), ("pos", "neg"), ("accept", "reject")),
)
_NEEDS = {
    "pair": "A preference row has `chosen` and `rejected`, and `prompt` unless both begin with it",
    "ranked": "A ranked row has `prompt` and `completions`, a list with the best first (or with `scores`)",
    "unpaired": "An unpaired row has `prompt`, `completion` and `label`; or `chosen` and `rejected`",
    "completion": "A row has `prompt` and `completion`, or `messages`, or `text`",
    "prompt_only": "A row has `prompt`",
}


def kind_of(columns: Sequence[str]) -> Kind | None:
    """The kind that columns speak for; None where they speak for none.

    Example:
        >>> kind_of(["prompt", "completion", "label"]), kind_of(["question"])
        ('unpaired', None)
    """
    order: tuple[Kind, ...] = ("pair", "ranked", "unpaired", "completion", "prompt_only")
    return next((kind for kind in order if set(LAYOUTS[kind][0]) <= set(columns) or _second(kind, columns)), None)


def _second(kind: Kind, columns: Sequence[str]) -> bool:
    return kind == "completion" and any(set(layout) <= set(columns) for layout in LAYOUTS[kind])


def columns_to_read(rows: Dataset, kind: Kind, name: str, first: int = 0) -> tuple[str, ...]:
    """The columns to read, in their order.

    Args:
        rows: the rows.
        kind: what they are to be read as.
        name: what to call them in messages.
        first: number of the first row, from 0.

    Raises:
        DataError: columns are missing, or there are some that must not be left out and cannot be read.
    """
    found = rows.column_names
    layout = next((layout for layout in LAYOUTS[kind] if set(layout) <= set(found)), None)
    if layout is None:
        raise DataError(_missing_columns(found, kind, name))
    for column in _UNSUPPORTED:
        if column in found and (row := first_filled(rows, column, first)) is not None:
            raise DataError(
                f"{name}: row {row}: the column `{column}` holds values, and Tether does not read it yet, so the model "
                "would see something else than was meant. Remove the column if the rows are complete without it."
            )
    if "label" in layout:
        _refuse_named_labels(rows, name)
    optional = [*EXTRAS, *(column for column in VALUES if column != "label")]
    optional += {"ranked": ["scores"], "pair": ["prompt"]}.get("pair" if "chosen" in layout else kind, [])
    filled = [column for column in optional if column in found and _worth_reading(rows, column)]
    return tuple(column for column in found if column in (*layout, *filled))


def _refuse_named_labels(rows: Dataset, name: str) -> None:
    """Refuse labels that are classes with names, unless these say of 0 that it is false: which number stands for which
    name is the data set's own choice, as in `good` for 0 and `bad` for 1."""
    kind = rows.features["label"]
    if isinstance(kind, ClassLabel) and [one.lower() for one in kind.names] not in (["0", "1"], ["false", "true"]):
        shown = ", ".join(f"`{one}` ({number})" for number, one in enumerate(kind.names))
        raise DataError(
            f"{name}: `label` holds the classes {shown}, and which of them is desirable is not guessed. Write true or "
            "false into that column."
        )


def _worth_reading(rows: Dataset, column: str) -> bool:
    """An optional column of nothing but nulls says nothing; a prompt is read whatever it holds."""
    return column == "prompt" or first_filled(rows, column) is not None


def _missing_columns(found: list[str], kind: Kind, name: str) -> str:
    missing = [
        column for column in min(LAYOUTS[kind], key=lambda one: len(set(one) - set(found))) if column not in found
    ]
    hints = [
        f"`{one}` says `{column}`" for pair in _OPPOSED if set(pair) <= set(found) for one, column in _answers(pair)
    ]
    for column in missing:
        alike = [one for one in found if one.strip().lower() == column]
        if alike:
            hints += [f"`{alike[0]}` to `{column}`, spelt as it is here"]
        elif column not in _UNGUESSED:
            near = difflib.get_close_matches(column, [f for f in found if f not in TEXTS], n=1, cutoff=0.5)
            hints += [f"`{near[0]}` looks like `{column}`"] if near else []
    other = kind_of(found)
    named = ", ".join(f"{column}: COLUMN" for column in missing)
    hint = f", or name them where the rows are: `{{path: FILE, fields: {{{named}}}}}`"
    if other not in (None, kind, "prompt_only"):
        hint = f"; these columns speak for rows of kind `{other}`"
    return (
        f"{name}: {_named(missing)} missing. Columns found: {', '.join(found) or 'none'}. "
        f"{_NEEDS[kind]}; rename the columns{' (' + ', '.join(hints) + ')' if hints else ''}{hint}."
    )


def _answers(pair: tuple[str, str]) -> list[tuple[str, str]]:
    return list(zip(pair, ("chosen", "rejected"), strict=True))


def _named(columns: Sequence[str]) -> str:
    listed = " and ".join(f"`{column}`" for column in columns)
    return f"the column {listed} is" if len(columns) == 1 else f"the columns {listed} are"


def first_filled(rows: Dataset, column: str, first: int = 0) -> int | None:
    """Number, from 1, of the first row with a value; read as Arrow, so that no image is decoded."""
    plain = rows.select_columns([column]).with_format("arrow")
    for start in range(0, len(plain), BATCH_ROWS):
        for number, value in enumerate(plain[start : start + BATCH_ROWS][column].to_pylist(), first + start + 1):
            if value not in (None, "", "[]", "{}", [], {}) and not (
                isinstance(value, dict) and not any(value.values())
            ):
                return number
    return None
