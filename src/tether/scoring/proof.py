"""Prove it or do not use it: the tree layout must give what each sequence gives alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tether.errors import ConfigError, ScoringError
from tether.models.structure import dtype_of, evaluation_mode, transformers_model
from tether.scoring.attention import remove_tree_attention
from tether.scoring.batch import pack, sequence_sources, sequences
from tether.scoring.score import Layout, score
from tether.types import Example, ScoringBatch

# Largest difference of one token's log-probability, in nats, that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 3e-1}


def tolerance(model: nn.Module) -> float:
    """Nats by which two right computations of a token's log-probability may differ in the model's dtype."""
    device = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype_of(model)
    return TOLERANCE[dtype]


def score_alone(model: nn.Module, batch: ScoringBatch) -> Tensor:
    """The plainest way: each sequence in a forward of its own, all its logits, an ordinary log-softmax.

    Slow; it is what every other way is compared with.

    Returns:
        `token_logps [N]` in float32.
    """
    parts = []
    for row, where in zip(sequences(batch), sequence_sources(batch), strict=True):
        logits = model(input_ids=row[None], attention_mask=torch.ones_like(row)[None], use_cache=False).logits[0]
        parts.append(logits[where].float().log_softmax(-1).gather(-1, row[where + 1, None])[:, 0])
    return torch.cat(parts)


@dataclass(frozen=True)
class Measures:
    """What a layout is proved by: the same numbers in a layout and with each sequence alone.

    Args:
        packed: model, batch and layout to numbers.
        alone: model and batch to the same numbers, the plainest way.
        unit: of a number; `counted`: what there is one number for.
    """

    packed: Callable[[nn.Module, ScoringBatch, Layout], Tensor]
    alone: Callable[[nn.Module, ScoringBatch], Tensor]
    unit: str
    counted: str


LOG_PROBS = Measures(
    lambda model, batch, layout: score(model, batch, layout=layout).token_logps, score_alone, "nats", "tokens"
)


@dataclass(frozen=True)
class LayoutChoice:
    """The layout a run uses, and the proof: largest difference per token from scoring alone, in nats."""

    layout: Layout
    difference: float
    line: str


def choose_layout(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    requested: Layout | None = None,
    measures: Measures | None = None,
) -> LayoutChoice:
    """Score real examples as a tree and alone, and take the tree layout only if they agree.

    Args:
        model: the policy.
        examples: a few real ones; with two completions or more, so that a leak between them would show.
        requested: a layout that is forced; it is proved all the same.
        measures: what is compared, as a function of a layout and as the plainest way; log-probabilities if None.

    Returns:
        The choice with one line to print.

    Raises:
        ScoringError: no layout gives what scoring alone gives, or the one that was forced does not.
    """
    device = next(model.parameters()).device
    batch, limit = pack(examples).to(device), tolerance(model)
    measures = measures or LOG_PROBS
    with torch.no_grad(), evaluation_mode(model):
        alone = measures.alone(model, batch)
        reason = ""
        for layout in (requested,) if requested else ("tree", "padded"):
            difference, problem = _compare(measures, model, batch, alone, layout)
            if difference <= limit:
                tokens = f"{difference:.1e} {measures.unit} from each sequence alone, {len(alone)} {measures.counted}"
                tokens += f" (allowed {limit:.0e})"
                return LayoutChoice(layout, difference, f"scoring: {layout} layout, at most {tokens}{reason}")
            reason += f"; {layout} layout refused: {problem or f'{difference:.1e} {measures.unit} off'}"
            if layout == "tree":
                remove_tree_attention(transformers_model(model))
    raise ScoringError(
        f"{type(transformers_model(model)).__name__} is not scored as it scores each sequence alone{reason}. "
        f"Allowed are {limit:.0e} {measures.unit}. "
        + ("Leave `scoring_layout` unset to let Tether choose." if requested else "This architecture is not supported.")
    )


def _compare(
    measures: Measures, model: nn.Module, batch: ScoringBatch, alone: Tensor, layout: Layout
) -> tuple[float, str]:
    try:
        difference = (measures.packed(model, batch, layout) - alone).abs().max().item()
    except ConfigError:
        raise
    except ScoringError as error:
        return float("inf"), str(error)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        return float("inf"), f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return (difference, "") if difference == difference else (float("inf"), "not a number")
