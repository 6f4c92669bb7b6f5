"""Causal attention in blocks of queries, for processors: matrix products of the library, and a backward of its own.

A block of queries multiplies only the keys that it may see, so half of the square is never computed, and the query
heads that share a key-value head are one product. The backward computes each block's weights once more, so that none
are kept. It is faster than torch's fused kernel on the processor that was measured, see `docs/performance.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int = 0) -> Tensor:
    """Attention of queries that are the last of their keys, each to the keys up to its own place.

    Args:
        query: `[1, heads, L, head_dim]`.
        key: `[1, key_value_heads, S, head_dim]` with `S >= L`; as `value`.
        scaling: factor of the scores.
        window: a query sees keys less than this many places before it; 0 for all.

    Returns:
        `[1, heads, L, head_dim]`, differentiable once.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    # The backward runs outside autocast, so what autocast would do to each product is done here once.
    with torch.autocast(kind, enabled=False):
        return _Blocked.apply(query.to(dtype), key.to(dtype), value.to(dtype), scaling, window)  # type: ignore


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:  # type: ignore
        ctx.save_for_backward(query, key, value)
        ctx.scaling, ctx.window = scaling, window
        grouped = _grouped(query * scaling, key.shape[1])
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        written = _grouped(output, key.shape[1])
        for rows, seen in _blocks(query.shape[2], key.shape[2], window):
            weights = _weights(_rows_of(grouped, rows), key[0, :, seen], rows.stop - rows.start, window)
            written[:, :, rows] = torch.bmm(weights, value[0, :, seen]).view_as(written[:, :, rows])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore
        query, key, value = ctx.saved_tensors
        groups = key.shape[1]
        grouped, grads = _grouped(query * ctx.scaling, groups), _grouped(grad.contiguous(), groups)
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        written = _grouped(grad_query, groups)
        # Sums over blocks, in float32 or better.
        wide = query.dtype if query.dtype == torch.float64 else torch.float32
        grad_key, grad_value = torch.zeros_like(key[0], dtype=wide), torch.zeros_like(value[0], dtype=wide)
        for rows, seen in _blocks(query.shape[2], key.shape[2], ctx.window):
            block, block_grad = _rows_of(grouped, rows), _rows_of(grads, rows)
            weights = _weights(block, key[0, :, seen], rows.stop - rows.start, ctx.window)
            grad_value[:, seen] += torch.bmm(weights.transpose(1, 2), block_grad)
            grad_weights = torch.bmm(block_grad, value[0, :, seen].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            written[:, :, rows] = torch.bmm(grad_scores, key[0, :, seen]).view_as(written[:, :, rows])
            grad_key[:, seen] += torch.bmm(grad_scores.transpose(1, 2), block)
        grad_query *= ctx.scaling
        return grad_query, grad_key[None].to(key.dtype), grad_value[None].to(value.dtype), None, None


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """`[1, heads, L, D]` as `[groups, heads / groups, L, D]`: the heads that share keys beside each other."""
    return tensor[0].unflatten(0, (groups, -1))


def _rows_of(grouped: Tensor, rows: slice) -> Tensor:
    """Some queries of each head of a group under each other: `[groups, heads / groups * rows, D]`."""
    return grouped[:, :, rows].flatten(1, 2)


def _blocks(queries: int, keys: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Slices of queries, each with the slice of the keys that any of them sees."""
    for first in range(0, queries, BLOCK):
        last = min(first + BLOCK, queries)
        end = keys - queries + last
        yield slice(first, last), slice(max(0, end - (last - first) - window + 1) if window else 0, end)


def _weights(block: Tensor, keys: Tensor, rows: int, window: int) -> Tensor:
    """Softmax of one block's scores, `[groups, heads / groups * rows, seen]`; the last key is the last query's own."""
    scores = torch.bmm(block, keys.transpose(1, 2))
    by_row = scores.unflatten(1, (-1, rows))
    # Only the last `rows` keys can lie after a query of the block.
    hidden = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu(1)
    by_row[..., -rows:].masked_fill_(hidden, -torch.inf)
    if window and keys.shape[1] > window:
        distance = torch.arange(rows)[:, None] + (keys.shape[1] - rows) - torch.arange(keys.shape[1])
        by_row.masked_fill_((distance >= window).to(scores.device), -torch.inf)
    return scores.softmax(-1)
