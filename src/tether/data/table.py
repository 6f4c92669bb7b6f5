"""A prepared set as an Arrow table: how long its rows are, and what it is told apart by. Called by `prepare`."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pyarrow as pa
from datasets import Dataset


def longest_row(dataset: Dataset) -> int:
    """Index of the row of `Prepared.dataset` whose prompt and longest completion have the most tokens together."""
    prompts, completions = lengths_of(dataset.data.table)
    longest = np.array([max(lengths, default=0) for lengths in completions])
    return int((prompts + longest).argmax())


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
    for column in table.itercolumns():
        values = column.combine_chunks()
        while pa.types.is_list(values.type):
            whole.update(values.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            values = values.flatten()
        whole.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False)).tobytes())
    return whole.hexdigest()
