"""Tree attention: every branch of a packed forest attends to its trunk and to itself, and to nothing else.

Registered with transformers' attention interface, one name per implementation it stands in for. A forward that carries
a `forest` is computed here, segment by segment; any other forward (generation, the padded layout, the user's own code)
goes to the implementation that the model had before, unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tether.errors import ScoringError
from tether.scoring.blocked import blocked_attention
from tether.types import Forest

PREFIX = "tether_tree_"
# Inside a forest's forward, the modules that attended to the forest so far; None outside.
_attended: ContextVar[list[nn.Module] | None] = ContextVar("tether_attended", default=None)


def install_tree_attention(model: PreTrainedModel) -> None:
    """Let `model` understand a `forest`; everything else it computes stays as it was.

    Raises:
        ScoringError: the architecture does not take its attention function from transformers' attention interface.
    """
    inner = model.config._attn_implementation
    if inner is None or inner.startswith(PREFIX):
        return
    name = PREFIX + inner
    if inner == "eager":
        AttentionInterface.register(name, _over_eager)
    else:
        AttentionInterface.register(name, _over(ALL_ATTENTION_FUNCTIONS[inner]))
    AttentionMaskInterface.register(name, _mask_over(ALL_MASK_ATTENTION_FUNCTIONS[inner]))
    try:
        model.set_attn_implementation(name)
    except (ValueError, KeyError) as error:
        raise ScoringError(f"{type(model).__name__} does not accept tree attention: {error}") from error


def remove_tree_attention(model: PreTrainedModel) -> None:
    """Give `model` back the attention implementation it had before `install_tree_attention`."""
    name = model.config._attn_implementation or ""
    if name.startswith(PREFIX):
        model.set_attn_implementation(name.removeprefix(PREFIX))


@contextmanager
def forest_forward() -> Iterator[list[nn.Module]]:
    """Inside, attention masks are left to the forest: none are built. Yields the modules that attend to it."""
    attended: list[nn.Module] = []
    token = _attended.set(attended)
    try:
        yield attended
    finally:
        _attended.reset(token)


def require_all_attended(model: PreTrainedModel, attended: list[nn.Module]) -> None:
    """Every layer must have read the forest; one that did not has mixed the branches without a word.

    Raises:
        ScoringError: some layers computed something else than tree attention.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    if len(attended) < layers:
        raise ScoringError(
            f"{type(model).__name__} reads the forest in {len(attended)} of its {layers} layers; score it with "
            "layout='padded'."
        )


def _over(inner: Any) -> Any:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any):
        forest = kwargs.pop("forest", None)
        if forest is None:
            return inner(module, query, key, value, attention_mask, **kwargs)
        return tree_attention(module, query, key, value, forest, **kwargs), None

    return attention


def _over_eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any):
    # Each architecture keeps its own eager function in its own file; it is the one that this module would have used.
    forest = kwargs.pop("forest", None)
    if forest is not None:
        return tree_attention(module, query, key, value, forest, **kwargs), None
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ScoringError(f"{type(module).__name__} has no eager attention function; load the model with sdpa.")
    return eager(module, query, key, value, attention_mask, **kwargs)


def _mask_over(inner: Any) -> Any:
    def mask(*args: Any, **kwargs: Any):
        return inner(*args, **kwargs) if _attended.get() is None else None

    return mask


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Attention over a packed forest by segments, without a `T x T` mask.

    The trunk and the first branch are one causal segment. Each further branch attends to the trunk's keys and,
    causally, to its own.

    Args:
        query: `[1, heads, T, head_dim]`.
        key: `[1, key_value_heads, T, head_dim]`; as `value`.
        forest: the layout of the T tokens.
        dropout: probability; `scaling` of the scores, default `head_dim ** -0.5`.
        sliding_window: a query sees keys less than this many positions before it.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: attention sinks, one logit per head.

    Returns:
        `[1, T, heads, head_dim]`.

    Raises:
        ScoringError: a batch that is not one packed row, or a position bias, which has no tree form here.
    """
    if query.shape[0] != 1 or query.shape[2] != forest.length:
        raise ScoringError(f"A forest of {forest.length} tokens met queries of shape {tuple(query.shape)}.")
    if position_bias is not None:
        raise ScoringError(f"{type(module).__name__} adds a position bias to its scores; use the padded layout.")
    if (attended := _attended.get()) is not None:
        attended.append(module)
    kernel = _Kernel(forest, dropout, scaling, sliding_window, softcap, s_aux)
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

    def __init__(self, forest: Forest, dropout: float, scaling: float | None, window: int | None, softcap, sinks):
        self.forest, self.dropout, self.scaling = forest, dropout, scaling
        self.window, self.softcap, self.sinks = window, softcap, sinks
        self.blocked = not dropout and softcap is None and sinks is None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, total = query.shape[2], key.shape[2]
        if self.blocked and query.device.type == "cpu" and query.dtype != torch.float16:
            scaling = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
            return blocked_attention(query, key, value, scaling=scaling, window=self.window or 0)
        if self.window is None or total <= self.window:
            return self._attend(query, key, value, 0)
        blocks = []
        for start in range(total - length, total, self.window):
            end, low = min(start + self.window, total), max(0, start - self.window + 1)
            rows = slice(start - (total - length), end - (total - length))
            blocks.append(self._attend(query[:, :, rows], key[:, :, low:end], value[:, :, low:end], self.window))
        return torch.cat(blocks, dim=2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
        mask = self._mask(query.shape[2], key.shape[2], window, query.device)
        if self.softcap is not None or self.sinks is not None:
            return self._plain(query, key, value, mask)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout,
            scale=self.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _mask(self, queries: int, keys: int, window: int, device: torch.device) -> Tensor | None:
        """Bool `[queries, keys]`, True where seen; None for a plain causal square. Built once per forest and shape."""
        if queries == keys and not window and self.softcap is None and self.sinks is None:
            return None
        slot = (queries, keys, window, device)
        if slot not in self.forest.cache:
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            seen = (distance >= 0) & (distance < window) if window else distance >= 0
            self.forest.cache[slot] = seen
        return self.forest.cache[slot]

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if self.scaling is None else self.scaling)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask is not None else scores
        if self.sinks is not None:
            sinks = self.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
            weights = torch.cat([scores, sinks], -1).softmax(-1, dtype=torch.float32)[..., :-1]
        else:
            weights = scores.softmax(-1, dtype=torch.float32)
        return F.dropout(weights, self.dropout).to(value.dtype) @ value
