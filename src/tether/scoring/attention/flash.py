"""Tree attention by FlashAttention's variable-length kernel, where the package is installed: one call for the row.

Each segment is a sequence of its own: trunk with first branch, then each further branch with the trunk's keys before
its own. The kernel aligns the causal mask to the bottom right, which is what a branch needs.

Reference:
    Dao, FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning, arXiv:2307.08691.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.errors import ScoringError
from tether.scoring.attention.sdpa import Options
from tether.types import Forest

DTYPES = (torch.float16, torch.bfloat16)


def flash_problem(device: str) -> str:
    """Why the kernel cannot run on a kind of device; empty when it can."""
    if device != "cuda":
        return f"FlashAttention runs on CUDA, and the model is on {device}"
    return "" if find_spec("flash_attn") else "the package flash_attn is not installed"


class Segments(NamedTuple):
    """How the kernel is told a forest.

    `keys` int64 `[total]` is where the keys lie in the row, the trunk's once for each branch; `query_edges` and
    `key_edges` int32 `[segments + 1]` where each sequence begins; the longest of each.
    """

    keys: Tensor
    query_edges: Tensor
    key_edges: Tensor
    longest_query: int
    longest_key: int


def segments(forest: Forest, device: torch.device) -> Segments:
    """The forest as sequences; kept in its cache. Queries stay in the row's order."""
    slot = ("flash", device)
    if slot not in forest.cache:
        keys, queries = [], []
        for tree in forest.trees:
            (start, trunk_end), (_, first_end), *further = tree.spans()
            keys.append(torch.arange(start, first_end))
            queries.append(first_end - start)
            for first, last in further:
                keys.append(torch.cat([torch.arange(start, trunk_end), torch.arange(first, last)]))
                queries.append(last - first)
        lengths = [len(part) for part in keys]
        query_edges, key_edges = (
            torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32) for sizes in (queries, lengths)
        )
        forest.cache[slot] = Segments(torch.cat(keys).to(device), query_edges, key_edges, max(queries), max(lengths))
    return forest.cache[slot]


def packed(query: Tensor, key: Tensor, value: Tensor, forest: Forest) -> tuple[Any, ...]:
    """What a variable-length kernel is given first: queries, keys, values, edges of both, longest of both."""
    told = segments(forest, query.device)
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    seen = keys.index_select(0, told.keys), values.index_select(0, told.keys)
    return queries, *seen, told.query_edges, told.key_edges, told.longest_query, told.longest_key


def flash_attention(query: Tensor, key: Tensor, value: Tensor, forest: Forest, options: Options) -> Tensor:
    """One call for the whole row; shapes as in `tree_attention`.

    Raises:
        ScoringError: attention sinks, or numbers of a precision that the kernel does not compute in.
    """
    if options.sinks is not None:
        raise ScoringError("FlashAttention's variable-length kernel has no attention sinks; use flex or sdpa.")
    if query.dtype not in DTYPES:
        raise ScoringError(
            f"FlashAttention computes in float16 and bfloat16, and the model in {query.dtype}; use sdpa."
        )
    output = _kernel()(
        *packed(query, key, value, forest),
        dropout_p=options.dropout,
        softmax_scale=options.scaling,
        causal=True,
        window_size=(-1, -1) if options.window is None else (options.window - 1, 0),
        softcap=options.softcap or 0.0,
    )
    return output[None]


def _kernel() -> Callable[..., Any]:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func
