"""Tree attention by segments over `scaled_dot_product_attention`: any device, no `T x T` mask, the trunk once.

What the other backends are compared with. On processors the segments are computed in blocks instead, see `blocked`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tether.scoring.attention.blocked import blocked_attention
from tether.types import Forest

# Numbers in a mask, or in scores where they must be held: beyond it, queries go in blocks, and memory stays linear.
LARGEST = 2**20


@dataclass(frozen=True)
class Options:
    """How a model wants its scores computed.

    Args:
        dropout: probability.
        scaling: of the scores; None: `head_dim ** -0.5`.
        window: a query sees keys less than this many positions before it; None: all.
        softcap: scores become `softcap * tanh(scores / softcap)`; None: they stay.
        sinks: `[heads]`, a further logit in each softmax that no value belongs to; None: there is none.
    """

    dropout: float = 0.0
    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def segmented_attention(query: Tensor, key: Tensor, value: Tensor, forest: Forest, options: Options) -> Tensor:
    """Trunk and first branch are one causal segment; each further branch attends to the trunk's keys and to its own.

    Shapes as in `tree_attention`.
    """
    return _by_segments(query, key, value, forest, _Kernel(forest, options))


def blocked_segments(query: Tensor, key: Tensor, value: Tensor, forest: Forest, options: Options) -> Tensor:
    """The same segments, each in blocks of queries; options that blocks do not have make it `segmented_attention`."""
    if options.dropout or options.softcap is not None or options.sinks is not None or query.dtype == torch.float16:
        return segmented_attention(query, key, value, forest, options)
    scaling = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    return _by_segments(
        query, key, value, forest, partial(blocked_attention, scaling=scaling, window=options.window or 0)
    )


def _by_segments(query: Tensor, key: Tensor, value: Tensor, forest: Forest, kernel: Callable[..., Tensor]) -> Tensor:
    sizes = [size for tree in forest.trees for size in (tree.trunk + tree.branches[0], *tree.branches[1:])]
    # `split` and not slices: its backward is one concatenation, not a zero-filled row for each segment.
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    outputs: list[Tensor] = []
    for tree in forest.trees:
        first = len(outputs)
        outputs.append(kernel(queries[first], keys[first], values[first]))
        trunk_key, trunk_value = keys[first][:, :, : tree.trunk], values[first][:, :, : tree.trunk]
        for i in range(first + 1, first + len(tree.branches)):
            joined = torch.cat([trunk_key, keys[i]], 2), torch.cat([trunk_value, values[i]], 2)
            outputs.append(kernel(queries[i], *joined))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


class _Kernel:
    """Attention of queries that are the last of their keys (bottom-right causal), with a model's options."""

    def __init__(self, forest: Forest, options: Options):
        self.forest, self.options = forest, options

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, total = query.shape[2], key.shape[2]
        window = self.options.window or 0
        window = window if window < total else 0
        if length == total and not window and not self._plain_only:
            return self._fused(query, key, value, None)
        size = self._block(query, total, window)
        if size >= length and not window:
            return self._attend(query, key, value, 0)
        blocks = []
        for start in range(total - length, total, size):
            end, low = min(start + size, total), max(0, start - window + 1) if window else 0
            rows = slice(start - (total - length), end - (total - length))
            part = query[:, :, rows], key[:, :, low:end], value[:, :, low:end]
            # Kept for the backward, the weights of all blocks would be the whole matrix again.
            if self._plain_only and torch.is_grad_enabled():
                blocks.append(checkpoint(self._attend, *part, window, use_reentrant=False))
            else:
                blocks.append(self._attend(*part, window))
        return torch.cat(blocks, dim=2)

    @property
    def _plain_only(self) -> bool:
        return self.options.softcap is not None or self.options.sinks is not None

    def _block(self, query: Tensor, total: int, window: int) -> int:
        """Queries at a time, so that a mask, and scores where they are held, stay below `LARGEST` numbers."""
        heads = query.shape[1] if self._plain_only else 1
        width = min(total, 2 * window) if window else total
        size = max(1, LARGEST // (width * heads))
        return min(size, window) if window else size

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        mask = self._mask(query.shape[2], key.shape[2], window, query.device)
        return (self._plain if self._plain_only else self._fused)(query, key, value, mask)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.options.dropout,
            scale=self.options.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _mask(self, queries: int, keys: int, window: int, device: torch.device) -> Tensor:
        """Bool `[queries, keys]`, True where seen. One for each number of queries; fewer keys are its last columns."""
        slot = ("sdpa", queries, window, device)
        known = self.forest.cache.get(slot)
        if known is None or known.shape[1] < keys:
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            known = self.forest.cache[slot] = (distance >= 0) & (distance < window) if window else distance >= 0
        return known[:, known.shape[1] - keys :]

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        options, groups = self.options, query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if options.scaling is None else options.scaling)
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if options.sinks is not None:
            sinks = options.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
            weights = torch.cat([scores, sinks], -1).softmax(-1, dtype=torch.float32)[..., :-1]
        else:
            weights = scores.softmax(-1, dtype=torch.float32)
        return F.dropout(weights, options.dropout).to(value.dtype) @ value
