"""Causal attention in blocks of queries, for processors: matrix products of the library, and a backward of its own.

A block of queries multiplies only the keys that it may see, so half of the square is never computed, and the query
heads that share a key-value head are rows of one product. The backward has the weights of blocks of few keys from the
forward and computes those of others once more, so that memory stays linear in the length. It is faster than torch's
fused kernel on the processor that was measured, see `docs/performance.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tether.compat.torch import softmax_backward, with_values

BLOCK = 96
# The weights of a block of at most so many keys are kept for the backward: no more than so many numbers a query.
KEPT = 512


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int = 0) -> Tensor:
    """Attention of queries that are the last of their keys, each to the keys up to its own place.

    Args:
        query: `[1, heads, L, head_dim]`.
        key: `[1, key_value_heads, S, head_dim]` with `S >= L`; as `value`, which may have another width.
        scaling: factor of the scores.
        window: a query sees keys less than this many places before it; 0 for all.

    Returns:
        `[1, heads, L, width of a value]`, differentiable once.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    # The backward runs outside autocast, so what autocast would do to each product is done here once.
    with torch.autocast(kind, enabled=False):
        if torch.compiler.is_compiling():
            return _traced(query.to(dtype), key.to(dtype), value.to(dtype), scaling, window)
        rows: Tensor = _Blocked.apply(query.to(dtype), key.to(dtype), value.to(dtype), scaling, window)  # type: ignore
    # Outside, as a view that a function of its own returns may not be changed in place by a model.
    return _as_heads(rows, query.shape[1] // key.shape[1])


def _traced(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
    """The same over the whole square: torch's compiler follows no tensor that is written into in parts."""
    heads, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = (one.repeat_interleave(heads, 1) for one in (key, value))
    places = torch.arange(keys, device=query.device)
    distance = places[keys - queries :, None] - places
    unseen = (distance < 0) | (distance >= window) if window else distance < 0
    scores = (query * scaling) @ key.transpose(2, 3)
    return scores.masked_fill(unseen, -torch.inf).softmax(-1) @ value


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:  # type: ignore
        groups, heads = key.shape[1], query.shape[1] // key.shape[1]
        rows, keys, values = _as_rows(query, groups, scaling), key[0], value[0]
        # Values may be narrower than keys, as where both are expanded from latents.
        output, kept = rows.new_empty(*rows.shape[:2], values.shape[2]), []
        for block, seen in _blocks(query.shape[2], key.shape[2], window):
            lines = _lines(block, heads)
            weights = _weights(rows[:, lines], keys[:, seen], heads, window)
            torch.bmm(weights, values[:, seen], out=output[:, lines])
            kept.append(weights if weights.shape[2] <= KEPT else None)
        ctx.save_for_backward(rows, key, value, *kept)
        ctx.scaling, ctx.window, ctx.heads = scaling, window, heads
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore
        rows, key, value, *kept = ctx.saved_tensors
        heads, keys, values = ctx.heads, key[0], value[0]
        grads = grad.contiguous()
        grad_rows = torch.empty_like(rows)
        # Sums over blocks, in float32 or better.
        wide = rows.dtype if rows.dtype == torch.float64 else torch.float32
        grad_keys, grad_values = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
        blocks = _blocks(rows.shape[1] // heads, key.shape[2], ctx.window)
        for (block, seen), found in zip(blocks, kept, strict=True):
            lines = _lines(block, heads)
            weights = _weights(rows[:, lines], keys[:, seen], heads, ctx.window) if found is None else found
            _add_product(grad_values[:, seen], weights.transpose(1, 2), grads[:, lines])
            grad_weights = torch.bmm(grads[:, lines], values[:, seen].transpose(1, 2))
            grad_scores = softmax_backward(grad_weights, weights)
            torch.bmm(grad_scores, keys[:, seen], out=grad_rows[:, lines])
            _add_product(grad_keys[:, seen], grad_scores.transpose(1, 2), rows[:, lines])
        grad_query = _as_heads(grad_rows.mul_(ctx.scaling), heads)
        return grad_query, grad_keys[None].to(key.dtype), grad_values[None].to(value.dtype), None, None


def _as_rows(tensor: Tensor, groups: int, factor: float) -> Tensor:
    """`[1, heads, L, D]` times a factor as `[groups, L * heads / groups, D]`: by place, then by head."""
    by_place = tensor[0].unflatten(0, (groups, -1)).transpose(1, 2)
    return torch.mul(by_place, factor, out=by_place.new_empty(by_place.shape)).flatten(1, 2)


def _as_heads(rows: Tensor, heads: int) -> Tensor:
    """What `_as_rows` undoes, as a view: `[1, groups * heads, L, D]`."""
    return rows.unflatten(1, (-1, heads)).transpose(1, 2).flatten(0, 1)[None]


def _lines(block: slice, heads: int) -> slice:
    """Where the rows of some places are."""
    return slice(block.start * heads, block.stop * heads)


def _blocks(queries: int, keys: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Slices of queries, each with the slice of the keys that any of them sees."""
    for first in range(0, queries, BLOCK):
        last = min(first + BLOCK, queries)
        end = keys - queries + last
        yield slice(first, last), slice(max(0, end - (last - first) - window + 1) if window else 0, end)


def _weights(rows: Tensor, keys: Tensor, heads: int, window: int) -> Tensor:
    """Softmax of one block's scores, `[groups, places * heads, seen]`; the last key is the last query's own."""
    scores = torch.bmm(rows, keys.transpose(1, 2))
    places = rows.shape[1] // heads
    # Without a window only the last keys, as many as there are places, can lie after a query of the block.
    far = keys.shape[1] if window and keys.shape[1] > window else places
    scores[..., -far:] += _hidden(places, far, heads, window, scores.dtype, scores.device)
    return scores.softmax(-1)


@lru_cache(maxsize=32)
def _hidden(places: int, keys: int, heads: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Added to the scores of the last keys, `[places * heads, keys]`: 0, or minus infinity where it may not see."""
    with torch.inference_mode(False), with_values():
        distance = torch.arange(places)[:, None] + (keys - places) - torch.arange(keys)
        unseen = (distance < 0) | (distance >= window) if window else distance < 0
        mask = torch.zeros(places, keys, dtype=dtype).masked_fill_(unseen, -torch.inf)
        return mask.repeat_interleave(heads, 0).to(device)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of `right`'s dtype to a sum of a dtype that may be wider."""
    if total.dtype == right.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)
