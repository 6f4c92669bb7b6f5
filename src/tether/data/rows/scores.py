"""What rows say themselves of how good their completions are. Called by `prepare` and by the check of rows."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from tether.data.rows.schema import Schema, python_rows
from tether.data.rows.values import as_number

_WORDS = ("score", "rating", "reward")


def scored_by(schema: Schema) -> tuple[str, ...]:
    """The columns with such numbers: `scores` of ranked rows, or two such as `score_chosen` and `score_rejected`, which
    training does not read; empty where there are none."""
    if schema.kind == "ranked":
        return tuple(column for column in schema.columns if column == "scores")
    for column in schema.unused_columns if schema.kind == "pair" else ():
        other = column.replace("chosen", "rejected")
        if other != column and other in schema.unused_columns and any(word in column.lower() for word in _WORDS):
            return column, other
    return ()


def not_borne_out(rows: Dataset, schema: Schema, start: int, stop: int) -> list[bool]:
    """Of each row from `start` to `stop` whether such numbers do not bear out the order of its completions: equal ones,
    which are taken in the order that they stand in, and a chosen one's that is not above the rejected one's.

    A row with another value than numbers counts as borne out.
    """
    columns = scored_by(schema)
    if not columns or not set(columns) <= set(rows.column_names):
        return [False] * (stop - start)
    return [_not_borne_out(list(row.values())) for row in python_rows(rows, columns, start, stop)]


def _not_borne_out(values: list[Any]) -> bool:
    if len(values) == 1:
        scores = [as_number("scores", one) for one in values[0]] if isinstance(values[0], list) else []
        return len(set(scores)) < len(scores)
    chosen, rejected = (as_number("score", one) for one in values)
    return chosen is not None and rejected is not None and chosen <= rejected
