"""A prepared set as an Arrow table: how long its rows are, and what it is told apart by. Called by `prepare`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from tether.compat.datasets import arrow_table
from tether.data.images.inputs import table_digest as images_digest
from tether.data.rows.columns import BATCH_ROWS, VALUES
from tether.errors import DataError
from tether.types import Example


def example_from_row(row: Mapping[str, Any]) -> Example:
    """One row of `Prepared.dataset` as an `Example`.

    Args:
        row: with `prompt_ids`, `completion_ids` and `source_row`; and where there are any, `scored` (lists of bools
            like `completion_ids`) and the columns of `VALUES`.

    Returns:
        The example, with int64 ids.

    Raises:
        DataError: the row is of no prepared set.

    Example:
        >>> example_from_row({"prompt_ids": [1, 5], "completion_ids": [[7, 2], [2]], "source_row": 3}).source_row
        3
    """
    if "prompt_ids" not in row:
        raise DataError(
            f"A row with the columns {', '.join(map(str, row))} was not prepared. A trainer prepares rows when it is "
            "made: give them to its constructor, or to `evaluate(rows)`; what is put in the place of its data sets "
            "later is not."
        )
    values = {name: row[name] for name in VALUES if name in row}
    return Example.of(
        row["prompt_ids"],
        row["completion_ids"],
        row["source_row"],
        values=values,
        scored=row.get("scored"),
        images=row.get("image_inputs"),
    )


def longest_row(dataset: Dataset) -> int:
    """Index of the row of `Prepared.dataset` whose prompt and longest completion have the most tokens together."""
    place, most, found = 0, -1, 0
    for batch in pieces(arrow_table(dataset)):
        prompts, completions = lengths_of(batch)
        longest = prompts + np.array([max(lengths, default=0) for lengths in completions])
        if longest.max() > most:
            most, found = int(longest.max()), place + int(longest.argmax())
        place += len(batch)
    return found


def pieces(table: pa.Table) -> Iterator[pa.Table]:
    """A table some rows at a time, as many in each whatever it was put together from."""
    for start in range(0, len(table), BATCH_ROWS):
        yield table.slice(start, BATCH_ROWS).combine_chunks()


def lengths_of(table: pa.Table) -> tuple[np.ndarray, list[list[int]]]:
    """Tokens of each prompt, and of each row's completions."""
    prompts = table["prompt_ids"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    nested = table["completion_ids"].combine_chunks()
    each = nested.flatten().value_lengths()
    offsets = pa.array(
        np.concatenate([[0], np.cumsum(nested.value_lengths().to_numpy(zero_copy_only=False))]), pa.int32()
    )
    return prompts, pa.ListArray.from_arrays(offsets, each).to_pylist()


def fingerprint_of(table: pa.Table) -> str:
    """A content hash of all columns; equal ids have an equal one, on every process and day."""
    whole = blake2b(digest_size=16)
    for piece in pieces(table):
        _add(piece, whole)
    return whole.hexdigest()


def _add(table: pa.Table, whole: blake2b) -> None:
    if "images" in table.column_names:
        whole.update(images_digest(table["images"]))
        table = table.drop_columns("images")
    for column in table.itercolumns():
        values = column.combine_chunks()
        while pa.types.is_list(values.type):
            whole.update(values.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            values = values.flatten()
        whole.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False)).tobytes())
