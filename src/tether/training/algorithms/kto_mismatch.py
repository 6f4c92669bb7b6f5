"""For KTO's estimate of the KL divergence: another row's completion under each row's prompt, fixed by the data."""

from __future__ import annotations

import logging
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from tether.compat.datasets import arrow_table
from tether.data import Prepared
from tether.data.images.parts import identities
from tether.data.rows.columns import BATCH_ROWS
from tether.errors import DataError

logger = logging.getLogger("tether")
_WALK = 1024


def mismatched_rows(prompts: list[bytes], completions: list[bytes]) -> tuple[NDArray[np.int64], int]:
    """For each row another one whose completion is no answer to its prompt.

    Rows of one prompt are put side by side and every completion is handed on to the next prompt, so that each is used
    once; for rows with a prompt each that is the completion of the row before. Where that would give a row its own
    prompt, or a completion equal to its own, the nearest row that differs in both is taken, and where there is none,
    one that differs in its completion.

    Args:
        prompts: something that is equal for equal prompts, for each of n rows.
        completions: the same for completions.

    Returns:
        Index of the other row `[n]`, and how many rows got a completion of their own prompt for want of another.

    Raises:
        DataError: a row has no other, because all completions are the same.

    Example:
        >>> mismatched_rows([b"a", b"b", b"c"], [b"1", b"2", b"3"])[0].tolist()
        [2, 0, 1]
        >>> mismatched_rows([b"a", b"a", b"b", b"b"], [b"1", b"2", b"3", b"4"])[0].tolist()
        [2, 3, 0, 1]
    """
    prompt, completion = _numbered(prompts), _numbered(completions)
    order = np.argsort(prompt, kind="stable")
    prompt, completion, rows = prompt[order], completion[order], len(order)
    shift = int(np.bincount(prompt).max())
    others = (np.arange(rows) - shift) % rows
    own_prompts = 0
    for i in np.flatnonzero((prompt[others] == prompt) | (completion[others] == completion)).tolist():
        found = _nearest(i, prompt, completion)
        if found is None:
            found, own_prompts = _nearest(i, None, completion), own_prompts + 1
        if found is None:
            raise DataError(
                f"All {rows} rows have the same completion, so KTO has no unrelated completion to estimate the KL "
                "divergence with. Add rows with other completions, or use the loss apo_zero_unpaired or bco."
            )
        others[i] = found
    result = np.empty(rows, dtype=np.int64)
    result[order] = order[others]
    return result, own_prompts


def _numbered(values: list[bytes]) -> NDArray[np.int64]:
    """Equal values as equal numbers, in order of their first appearance."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def _nearest(i: int, prompt: NDArray[np.int64] | None, completion: NDArray[np.int64]) -> int | None:
    """The first row before i, going round, with another completion (and another prompt); None if there is none."""
    rows = len(completion)
    for start in range(1, rows, _WALK):
        near = (i - np.arange(start, min(start + _WALK, rows))) % rows
        fits = completion[near] != completion[i]
        if prompt is not None:
            fits &= prompt[near] != prompt[i]
        if fits.any():
            return int(near[fits.argmax()])
    return None


def with_mismatched(prepared: Prepared, max_length: int | None) -> Prepared:
    """Prepared rows of one completion, each with another row's completion as its second.

    The pairing is made of the data alone, once: it depends neither on the order of training nor on batches, processes
    or accumulation. It is made among the rows that came of `BATCH_ROWS` rows of the source at a time, so that rows that
    are streamed get the same. A row keeps its own prompt, images included, and prompts that differ in their images
    alone are two.

    Args:
        prepared: rows of kind `unpaired`.
        max_length: tokens of prompt and completion; a longer second completion loses its end.

    Returns:
        The same rows with two completions each, and the same report.

    Raises:
        DataError: see `mismatched_rows`.
    """
    table: pa.Table = arrow_table(prepared.dataset.with_format(None))
    blocks = np.asarray(table["source_row"].to_numpy()) // BATCH_ROWS
    bounds = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(table)]
    pairing = Mismatching(max_length, prepared.report.name)
    parts = [pairing(table.slice(start, stop - start)) for start, stop in pairwise(bounds)]
    fingerprint = _digest([prepared.report.fingerprint, max_length]).hex()
    shape = prepared.dataset.format  # what reads the images of a row when it is asked for
    paired = Dataset(pa.concat_tables(parts).combine_chunks(), fingerprint=fingerprint)
    return replace(prepared, dataset=paired.with_format(shape["type"], **shape["format_kwargs"]))


class Mismatching:
    """Gives each row of a block of prepared rows another row's completion as its second, one block after the other.

    The other row is of the same block; where that has no unrelated one, also of the block before it.

    Args:
        max_length: see `with_mismatched`.
        name: what to call the rows in messages.
    """

    def __init__(self, max_length: int | None, name: str) -> None:
        self._max_length, self._name = max_length, name
        self._before: tuple[list[bytes], list[list[int]]] = [], []
        self._said = False

    def __call__(self, table: pa.Table) -> pa.Table:
        """The block, each row with two completions.

        Raises:
            DataError: see `mismatched_rows`.
        """
        ids = table["prompt_ids"].to_pylist()
        prompts = [_digest([one, seen]) for one, seen in zip(ids, identities(Dataset(table)), strict=True)]
        own = [row[0] for row in table["completion_ids"].to_pylist()]
        others = self._others(prompts, own)
        room = [None if self._max_length is None else self._max_length - len(one) for one in ids]
        second = [completion[:length] for completion, length in zip(others, room, strict=True)]
        columns: dict[str, list[Any]] = {"completion_ids": [list(both) for both in zip(own, second, strict=True)]}
        if "scored" in table.column_names:
            masks = [row[0] for row in table["scored"].to_pylist()]
            columns["scored"] = [[mask, [True] * len(ids)] for mask, ids in zip(masks, second, strict=True)]
        for name, values in columns.items():
            at = table.column_names.index(name)
            table = table.set_column(at, name, pa.array(values, type=table.schema.field(name).type))
        self._before = prompts, own
        return table

    def _others(self, prompts: list[bytes], own: list[list[int]]) -> list[list[int]]:
        """Another completion for each row."""
        earlier_prompts, earlier = self._before
        try:
            places, alike = mismatched_rows(prompts, [_digest(ids) for ids in own])
        except DataError:
            if not earlier:
                raise
            places, alike = np.zeros(0, dtype=np.int64), len(own)
        every = own
        if alike and earlier:
            every, asked = [*earlier, *own], [*earlier_prompts, *prompts]
            places = mismatched_rows(asked, [_digest(ids) for ids in every])[0][len(earlier) :]
            alike = sum(asked[j] == prompt for j, prompt in zip(places.tolist(), prompts, strict=True))
        if alike and not self._said:
            self._said = True
            logger.warning(
                f"{self._name}: {alike} of {len(own)} rows share their prompt with every row near them that has "
                "another completion, so that their share of the KL estimate uses an answer to the same prompt."
            )
        return [every[j] for j in places.tolist()]


def _digest(values: list[Any]) -> bytes:
    return blake2b(repr(values).encode(), digest_size=16).digest()
