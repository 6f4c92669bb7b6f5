"""The one scoring function, for the policy and for the reference alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.compat.transformers import carries_state, logits_bias
from tether.errors import ConfigError, ScoringError
from tether.models.adapters import virtual_tokens
from tether.models.before.limits import rotary_limit
from tether.models.structure import transformers_model
from tether.scoring.attention.interface import (
    Backend,
    backends_for,
    forest_forward,
    install_tree_attention,
    require_all_attended,
)
from tether.scoring.batch import sequence_counts, sequence_sources, sequences
from tether.scoring.head import CHUNK, OUTPUTS, Head, token_scores
from tether.scoring.layout.encoder_decoder import encoder_decoder
from tether.scoring.layout.vision import padded_images, tree_images
from tether.scoring.router import has_router, load_balancing_loss
from tether.types import Scores, ScoringBatch

# How long each row of a padded forward is without its padding, for hooks on the model; None outside of one.
row_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("row_lengths", default=None)
Layout = Literal["tree", "padded", "encoder_decoder"]
Output = Literal["entropy", "top1", "mean_logits", "log_collision", "aux_loss", "hidden", "entropy_gradient"]


def score(
    model: nn.Module,
    batch: ScoringBatch,
    *,
    outputs: tuple[Output, ...] = (),
    layout: Layout = "tree",
    backend: Backend | Literal["auto"] = "auto",
    chunk: int = CHUNK,
    temperature: float = 1.0,
    wide_head: bool = False,
) -> Scores:
    """Log-probability of every completion token of a batch under a language model.

    Differentiable in the model's trainable tensors. The model is called through its own forward, wrappers included, in
    the mode (training or evaluation) that it is in.

    Args:
        model: a transformers or PEFT model, wrapped or not, that begins on the batch's device.
        batch: B packed prompts with K completions and N completion tokens, see `pack`.
        outputs: further values from the same pass: of each token's distribution `entropy`, `top1`, `mean_logits`,
            `log_collision`; its `hidden` state before the head; `aux_loss` (`load_balancing_loss`) of the batch;
            `entropy_gradient` gives `entropy` with its gradient, at the cost of one more product with the head.
        layout: `tree` computes each prompt once and never pads; `padded` gives each of the K sequences a row of its
            own; `encoder_decoder` encodes each prompt once, for models with an encoder.
        backend: of a tree's attention: `blocked`, `sdpa`, `flex`, `varlen` or `flash`; `auto`: the device's first.
        chunk: tokens whose logits exist at once.
        temperature: what logits are divided by.
        wide_head: the head's product is in float32, whatever the precision.

    Returns:
        `Scores` with `token_logps [N]` in float32 nats.

    Raises:
        ScoringError: the model cannot be called this way, for instance it has no language-model head.
        ConfigError: an unknown layout, output or backend, or a backend that cannot work here.
    """
    inner = transformers_model(model)
    _check_request(inner, outputs, layout, virtual_tokens(model))
    head, routed, kept = head_of(inner, temperature, wide_head), "aux_loss" in outputs, "hidden" in outputs
    _refuse_length_dependence(inner, batch)
    inputs, sources, context = _LAYOUTS[layout](inner, batch)
    if "forest" in inputs:
        inputs["tree_backend"] = backends_for(batch.input_ids.device, gradients=False, requested=backend)[0]
    if has_router(inner):
        inputs["output_router_logits"] = routed
    with capture_hidden(head.module) as captured, context as attended:
        answer = model(**inputs, use_cache=False)
    if attended is not None:
        require_all_attended(inner, attended)
    hidden = _predicting_states(captured, inner, inputs, layout).index_select(0, sources.to(captured[0].device))
    per_token, through = tuple(name for name in OUTPUTS if name in outputs), "entropy_gradient" in outputs
    found = token_scores(head, hidden, batch.targets, outputs=per_token, chunk=chunk, entropy_gradient=through)
    weights = inputs.get("attention_mask", sequence_counts(batch)[None]) if routed else None
    return Scores(
        completion_index=batch.completion_index,
        num_completions=batch.num_completions,
        **({"hidden": hidden, "head": head.logits} if kept else {}),
        aux_loss=None if weights is None else load_balancing_loss(inner, answer.router_logits, weights),
        **found._asdict(),
    )


def _predicting_states(
    captured: list[Tensor], model: PreTrainedModel, inputs: dict[str, Any], layout: str
) -> Float[Tensor, "places hidden_size"]:
    """What the head was given, on the device where a model that is spread over several ends."""
    if len(captured) != 1:
        raise ScoringError(f"The head of {type(model).__name__} was called {len(captured)} times, not once.")
    return _of_real_tokens(captured[0], inputs, layout).flatten(0, 1)


def _check_request(model: PreTrainedModel, outputs: tuple[str, ...], layout: str, virtual: int) -> None:
    allowed = get_args(Output)
    if layout not in _LAYOUTS or not set(outputs) <= set(allowed):
        raise ConfigError(
            f"score(): layout {layout!r}, outputs {outputs!r}; layouts are {', '.join(_LAYOUTS)}, outputs {allowed}."
        )
    if "aux_loss" in outputs and not has_router(model):
        raise ConfigError(f"score(): {type(model).__name__} has no experts, so there is no aux_loss.")
    if virtual and layout != "padded":
        raise ScoringError(f"{virtual} virtual tokens of prompt tuning come before each row; a packed row has no place")


def _refuse_length_dependence(model: PreTrainedModel, batch: ScoringBatch) -> None:
    """Some rotary embeddings take their factors from the longest sequence of a forward, so that rows would mix."""
    limit = rotary_limit(model.config)
    if limit is None:
        return  # reading a value would wait for the device, and without weights there is none
    longest = int(batch.position_ids.max()) + 1
    if longest > limit[0]:
        raise ScoringError(
            f"A sequence has {longest} tokens, and {type(model).__name__} changes its rotary embedding "
            f"({limit[1]}) for every row of a forward beyond {limit[0]}. Set max_length to {limit[0]} or less."
        )


def head_of(model: PreTrainedModel, temperature: float = 1.0, wide: bool = False) -> Head:
    """The language-model head, with the scale and softcap that the architecture applies to its logits."""
    module = model.get_output_embeddings()
    if module is None:
        raise ScoringError(
            f"{type(model).__name__} has no language-model head, so it gives no token a probability. "
            "Load it with AutoModelForCausalLM."
        )
    config: Any = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    # BART's head is a linear layer without a bias, and the model adds one to the logits: `logits_bias`.
    return Head(module, scale / divisor, softcap, logits_bias(model), temperature, wide)


def _of_real_tokens(hidden: Tensor, inputs: dict[str, Any], layout: str) -> Tensor:
    """Without the virtual tokens of prompt tuning, which come first in each row unless the adapter is off."""
    added = hidden.shape[1] - inputs["input_ids"].shape[1] if layout == "padded" else 0
    return hidden[:, added:]


@contextmanager
def capture_hidden(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what enters the head and let it compute nothing: the fused head does its work on scored rows only."""
    captured: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(args[0])
        return (args[0][:, :0], *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield captured
    finally:
        handle.remove()


def require_tree(model: PreTrainedModel) -> None:
    """Refuse a model that is known not to keep branches apart.

    Raises:
        ScoringError: with the reason.
    """
    chunk = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    if chunk:
        raise ScoringError(f"{type(model).__name__} attends in chunks of {chunk} tokens along the row")
    if carries_state(model):
        raise ScoringError(f"{type(model).__name__} carries state along the row, which would run through the branches")


def _tree(model: PreTrainedModel, batch: ScoringBatch) -> tuple[dict[str, Any], Tensor, Any]:
    require_tree(model)
    install_tree_attention(model)
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "forest": batch.forest}
    return tree_images(model, batch, inputs), batch.sources, forest_forward()


@contextmanager
def _lengths_of(rows: list[Tensor]) -> Iterator[None]:
    token = row_lengths.set(tuple(map(len, rows)))
    try:
        yield
    finally:
        row_lengths.reset(token)


def _padded(model: PreTrainedModel, batch: ScoringBatch) -> tuple[dict[str, Any], Tensor, Any]:
    rows = sequences(batch)
    width = max(len(row) for row in rows)
    ids = batch.input_ids.new_zeros(len(rows), width)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    sources = torch.cat([i * width + where for i, where in enumerate(sequence_sources(batch))])
    # Each model counts positions as it does for itself; padding comes last.
    inputs = {"input_ids": ids, "attention_mask": mask}
    return padded_images(model, batch, inputs), sources, _lengths_of(rows)


_LAYOUTS: dict[str, Callable[[PreTrainedModel, ScoringBatch], tuple[dict[str, Any], Tensor, Any]]] = {
    "tree": _tree,
    "padded": _padded,
    "encoder_decoder": encoder_decoder,
}
