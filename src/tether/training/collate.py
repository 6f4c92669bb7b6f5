"""From rows of a prepared data set to a packed batch; the collator of every trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tether.data import example_from_row
from tether.errors import ConfigError
from tether.scoring import pack
from tether.types import ScoringBatch


def collate(rows: list[dict[str, Any]]) -> dict[str, ScoringBatch]:
    """Pack prepared rows; a dictionary because transformers' `Trainer` expects one."""
    return {"batch": pack([example_from_row(row) for row in rows])}


def batch_of(inputs: Any) -> ScoringBatch:
    """The batch inside what a collator returned.

    Raises:
        ConfigError: there is none.
    """
    batch = inputs.get("batch") if isinstance(inputs, Mapping) else None
    if not isinstance(batch, ScoringBatch):
        raise ConfigError(
            f"The data collator returned {type(inputs).__name__}; it must return a dictionary with a "
            "ScoringBatch under 'batch', as tether.training.collate does. Leave data_collator out to pack the rows."
        )
    return batch
