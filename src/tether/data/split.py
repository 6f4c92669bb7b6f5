"""Rows set aside for evaluation, chosen by a hash, so that tomorrow it is the same ones. Called by the trainers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from datasets import Dataset

from tether.data.images.parts import as_text, fault_message, has_parts, identities
from tether.data.prepare.report import digest
from tether.data.rows.schema import preferences, python_rows, read_preferences
from tether.errors import ConfigError, DataError
from tether.types import Kind

By = Literal["prompt", "row"]
_SCALE = 1 << 64


def is_split(value: Any) -> bool:
    """Whether a value asks for a part of the training rows: `{split: 0.05, by: prompt}`."""
    return isinstance(value, Mapping) and "split" in value and "path" not in value


def split_rows(rows: Dataset, asked: Mapping[str, Any], *, kind: Kind = "pair") -> tuple[Dataset, Dataset]:
    """Set rows aside for evaluation.

    Args:
        rows: as `load_rows` returns them.
        asked: `split`, a share between 0 and 1 or a number of rows; `by`, `prompt` (left out, too) or `row`. By prompt,
            no prompt is on both sides; prompts with other images are others. What is set aside depends on text and
            images alone: rows that are added or shuffled do not move others to another side, with a share.
        kind: what the rows are to be read as.

    Returns:
        The rows to train on and those set aside, each in the order in which they came.

    Raises:
        ConfigError: `asked` holds something else.
        DataError: rows cannot be read, or one side would be empty.
    """
    share, by = _checked(asked, len(rows))
    keys = _keys(rows, by, kind)
    if isinstance(share, float):
        aside = {key for key in keys if int.from_bytes(key[:8], "big") / _SCALE < share}
    else:
        aside, taken = set(), 0
        counts: dict[bytes, int] = {}
        for key in keys:
            counts[key] = counts.get(key, 0) + 1
        for key in sorted(counts):
            if taken < share:
                aside.add(key)
                taken += counts[key]
    held = [place for place, key in enumerate(keys) if key in aside]
    kept = [place for place, key in enumerate(keys) if key not in aside]
    if not held or not kept:
        raise DataError(
            f"train: a split of {share} by {by} sets {len(held)} of {len(rows)} rows aside, which leaves one side "
            "empty. Ask for another share, or split by row."
        )
    return rows.select(kept), rows.select(held)


def _checked(asked: Mapping[str, Any], rows: int) -> tuple[float | int, By]:
    if unknown := [key for key in asked if key not in ("split", "by")]:
        raise ConfigError(f"eval has the key `{unknown[0]}` beside `split`; known are `split` and `by`.")
    share, by = asked["split"], asked.get("by", "prompt")
    if by not in ("prompt", "row"):
        raise ConfigError(f"eval.by is {by!r}; it must be `prompt` or `row`.")
    right = (isinstance(share, float) and 0 < share < 1) or (
        isinstance(share, int) and not isinstance(share, bool) and 0 < share < rows
    )
    if not right:
        raise ConfigError(
            f"eval.split is {share!r}; it must be a share between 0 and 1, or fewer than the {rows} rows."
        )
    return share, by


def _keys(rows: Dataset, by: By, kind: Kind) -> list[bytes]:
    """A digest of each row's text and images, or of its prompt with these."""
    seen = identities(rows)
    if any(seen) or has_parts(rows):
        text = as_text(rows)
        if text.faults:
            raise DataError(fault_message(text.faults, "train"))
        rows = text.rows
    schema = read_preferences(rows, kind=kind, name="train")
    if by == "row" or schema.whole:
        texts = [_spelled(list(row.values())) for row in python_rows(rows, schema.columns)]
    else:
        texts = [_spelled(record.prompt) for record in preferences(rows, schema)]
    # Rows without images keep the key that they had before there were any.
    return [digest(text, *filter(None, [images])) for text, images in zip(texts, seen, strict=True)]


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
