"""What the tests of streams share: chunks small enough that a few rows are many of them."""

from __future__ import annotations

import sys
from typing import Any

import pytest

ROWS_PER_CHUNK = 10


def small_chunks(monkeypatch: pytest.MonkeyPatch, rows: int = ROWS_PER_CHUNK) -> None:
    """Rows are read and prepared so many at a time, in this process and in those it starts."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tether") and hasattr(module, "BATCH_ROWS"):
            monkeypatch.setattr(module, "BATCH_ROWS", rows)


def plain(dataset: Any) -> list[dict[str, Any]]:
    """Rows of a data set without the fields that are empty, of rows and of messages: another table may lack them."""
    return [_filled(row) for row in dataset.to_list()]


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(one) for key, one in value.items() if one is not None}
    return [_filled(one) for one in value] if isinstance(value, list) else value
