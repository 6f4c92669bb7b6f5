"""Tree attention: every branch of a packed forest attends to its trunk and to itself, and to nothing else.

Registered with transformers' attention interface, one name per implementation it stands in for. A forward that carries
a `forest` is computed here, by one of several backends; any other forward (generation, the padded layout, the user's
own code) goes to the implementation that the model had before, unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tether.compat.transformers import (
    attention_of,
    eager_attention,
    registered_attention,
    registered_mask,
    set_attention,
)
from tether.errors import ConfigError, ScoringError
from tether.scoring.attention.flash import flash_attention, flash_problem
from tether.scoring.attention.flex import flex_tree_attention
from tether.scoring.attention.sdpa import Options, blocked_segments, segmented_attention
from tether.scoring.attention.varlen import varlen_problem, varlen_tree_attention
from tether.types import Forest

Backend = Literal["blocked", "sdpa", "flex", "varlen", "flash"]
BACKENDS = {
    "blocked": blocked_segments,
    "sdpa": segmented_attention,
    "flex": flex_tree_attention,
    "varlen": varlen_tree_attention,
    "flash": flash_attention,
}
# Those that compute in half precision alone, which also their proof then has.
HALF = ("varlen", "flash")


class Decoding(Protocol):
    """What attends in place of a forest, a token of each branch at a time; see `tether.rollout.decode`."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """See `tree_attention`."""
        ...


PREFIX = "tether_tree_"
# Inside a forest's forward, the modules that attended to the forest so far; None outside.
_attended: ContextVar[list[nn.Module] | None] = ContextVar("tether_attended", default=None)


def install_tree_attention(model: PreTrainedModel) -> None:
    """Let `model` understand a `forest`; everything else it computes stays as it was.

    Raises:
        ScoringError: the architecture does not take its attention function from transformers' attention interface.
    """
    inner = attention_of(model)
    if inner is None or inner.startswith(PREFIX):
        return
    name = PREFIX + inner
    if inner == "eager":
        AttentionInterface.register(name, _over_eager)
    else:
        AttentionInterface.register(name, _over(registered_attention(inner)))
    AttentionMaskInterface.register(name, _mask_over(registered_mask(inner)))
    try:
        set_attention(model, name)
    except (ValueError, KeyError) as error:
        raise ScoringError(f"{type(model).__name__} does not accept tree attention: {error}") from error


def remove_tree_attention(model: PreTrainedModel) -> None:
    """Give `model` back the attention implementation it had before `install_tree_attention`."""
    name = attention_of(model) or ""
    if name.startswith(PREFIX):
        set_attention(model, name.removeprefix(PREFIX))


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
    """Every layer must have read the forest; one that did not has mixed the branches silently.

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
        if kwargs.get("forest") is None and kwargs.get("decoding") is None:
            kwargs.pop("forest", None)
            return inner(module, query, key, value, attention_mask, **kwargs)
        return _attend(module, query, key, value, **kwargs), None

    return attention


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    forest: Forest | None = None,
    decoding: Decoding | None = None,
    **options: Any,
) -> Tensor:
    if decoding is not None:
        note_attended(module)
        return decoding.attend(module, query, key, value, forest=forest, **options)
    assert forest is not None
    return tree_attention(module, query, key, value, forest, **options)


def note_attended(module: nn.Module) -> None:
    """Count a module among those that read the layout, for `require_all_attended`."""
    if (attended := _attended.get()) is not None and module not in attended:
        attended.append(module)


def _over_eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any):
    if kwargs.get("forest") is not None or kwargs.get("decoding") is not None:
        return _attend(module, query, key, value, **kwargs), None
    kwargs.pop("forest", None)
    eager = eager_attention(module)
    if eager is None:
        raise ScoringError(f"{type(module).__name__} has no eager attention function; load the model with sdpa.")
    return eager(module, query, key, value, attention_mask, **kwargs)


def _mask_over(inner: Any) -> Any:
    def mask(*args: Any, **kwargs: Any):
        return inner(*args, **kwargs) if _attended.get() is None else None

    return mask


def backends_for(device: torch.device | str, *, gradients: bool, requested: str = "auto") -> tuple[Backend, ...]:
    """The backends to try on a device, best first.

    Args:
        device: where the model is.
        gradients: whether it will be trained.
        requested: `auto`, or the one that is forced.

    Raises:
        ConfigError: an unknown backend, or a forced one that cannot work here.
    """
    kind = torch.device(device).type
    if requested == "auto":
        if kind == "cuda":
            return ("flex", "sdpa")
        return ("blocked",) if kind == "cpu" else ("sdpa",)
    if requested not in BACKENDS:
        raise ConfigError(f"attention_backend is {requested!r}; allowed are auto, {', '.join(BACKENDS)}.")
    problem = ""
    if requested == "flex" and kind == "cpu" and gradients:
        problem = "FlexAttention has no backward on a CPU"
    elif requested in HALF:
        problem = flash_problem(kind) if requested == "flash" else varlen_problem(kind)
    if problem:
        raise ConfigError(f"attention_backend is {requested!r}: {problem}. Use auto or sdpa.")
    return (requested,)  # type: ignore[return-value]


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    *,
    tree_backend: Backend = "sdpa",
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Attention over a packed forest, without a `T x T` mask.

    Args:
        query: `[1, heads, T, head_dim]`.
        key: `[1, key_value_heads, T, head_dim]`; as `value`.
        forest: the layout of the T tokens.
        tree_backend: which implementation computes it.
        dropout: probability; `scaling` of the scores, default `head_dim ** -0.5`.
        sliding_window: a query sees keys less than this many positions before it.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: attention sinks, one logit per head.

    Returns:
        `[1, T, heads, head_dim]`.

    Raises:
        ScoringError: a batch that is not one packed row, a position bias, which has no tree form here, or an option
            that the backend cannot honour.
    """
    if query.shape[0] != 1 or query.shape[2] != forest.length:
        raise ScoringError(f"A forest of {forest.length} tokens met queries of shape {tuple(query.shape)}.")
    if position_bias is not None:
        raise ScoringError(f"{type(module).__name__} adds a position bias to its scores; use the padded layout.")
    note_attended(module)
    options = Options(dropout, scaling, sliding_window, softcap, s_aux)
    return BACKENDS[tree_backend](query, key, value, forest, options)
