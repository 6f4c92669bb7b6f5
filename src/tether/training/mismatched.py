"""For KTO's estimate of the KL divergence: another row's completion under each row's prompt, fixed by the data."""

from __future__ import annotations

import logging
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from tether.data import Prepared
from tether.data.image_parts import identities
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
    or accumulation. A row keeps its own prompt, images included, and prompts that differ in their images alone are two.

    Args:
        prepared: rows of kind `unpaired`.
        max_length: tokens of prompt and completion; a longer second completion loses its end.

    Returns:
        The same rows with two completions each, and the same report.

    Raises:
        DataError: see `mismatched_rows`.
    """
    dataset = prepared.dataset.with_format(None)
    prompts, own = dataset["prompt_ids"][:], [row[0] for row in dataset["completion_ids"][:]]
    asked = [_digest([ids, seen]) for ids, seen in zip(prompts, identities(dataset), strict=True)]
    others, own_prompts = mismatched_rows(asked, [_digest(ids) for ids in own])
    if own_prompts:
        logger.warning(
            f"{prepared.report.name}: {own_prompts} of {len(own)} rows share their prompt with every row that has "
            "another completion, so that their share of the KL estimate uses an answer to the same prompt."
        )
    room = [None if max_length is None else max_length - len(ids) for ids in prompts]
    table: pa.Table = dataset.data.table
    columns: dict[str, list[Any]] = {"completion_ids": [], "scored": []}
    scored = [row[0] for row in dataset["scored"][:]] if "scored" in dataset.column_names else None
    for i, j in enumerate(others.tolist()):
        columns["completion_ids"].append([own[i], own[j][: room[i]]])
        if scored is not None:
            columns["scored"].append([scored[i], [True] * len(own[j][: room[i]])])
    for name, values in columns.items():
        if values:
            at = table.column_names.index(name)
            table = table.set_column(at, name, pa.array(values, type=table.schema.field(name).type))
    fingerprint = _digest([prepared.report.fingerprint, max_length]).hex()
    shape = prepared.dataset.format  # what reads the images of a row when it is asked for
    paired = Dataset(table, fingerprint=fingerprint).with_format(shape["type"], **shape["format_kwargs"])
    return replace(prepared, dataset=paired)


def _digest(values: list[Any]) -> bytes:
    return blake2b(repr(values).encode(), digest_size=16).digest()
