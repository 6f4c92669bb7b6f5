"""From rows of a prepared data set to a packed batch; the collator of every trainer."""

from __future__ import annotations

from typing import Any

from tether.data import example_from_row
from tether.scoring import pack
from tether.types import ScoringBatch


def collate(rows: list[dict[str, Any]]) -> dict[str, ScoringBatch]:
    """Pack prepared rows; a dictionary because transformers' `Trainer` expects one."""
    return {"batch": pack([example_from_row(row) for row in rows])}
