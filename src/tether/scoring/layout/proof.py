"""Prove it or do not use it: the tree layout must give what each sequence gives alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from tether.errors import ConfigError, ScoringError
from tether.models.structure import dtype_of, evaluation_mode, transformers_model
from tether.scoring.attention.interface import Backend, backends_for, remove_tree_attention
from tether.scoring.batch import pack, sequence_sources, sequences
from tether.scoring.layout.encoder_decoder import is_encoder_decoder, logits_alone
from tether.scoring.layout.vision import has_images, images_alone
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
    inner = transformers_model(model)
    if is_encoder_decoder(inner):
        pairs = logits_alone(model, inner, batch)
        return torch.cat([logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for logits, ids in pairs])
    beside = images_alone(batch) if has_images(batch) else repeat({})
    for row, where, images in zip(sequences(batch), sequence_sources(batch), beside, strict=False):
        mask = torch.ones_like(row)[None]
        logits = model(input_ids=row[None], attention_mask=mask, use_cache=False, **images).logits[0]
        logits = logits[-len(row) :]  # virtual tokens of prompt tuning come first
        parts.append(logits[where].float().log_softmax(-1).gather(-1, row[where + 1, None])[:, 0])
    return torch.cat(parts)


@dataclass(frozen=True)
class Measures:
    """What a layout is proved by: the same numbers in a layout and with each sequence alone.

    Args:
        packed: model, batch, and layout and backend as keywords, to numbers.
        alone: model and batch to the same numbers, the plainest way.
        unit: of a number; `counted`: what there is one number for.
    """

    packed: Callable[..., Tensor]
    alone: Callable[[nn.Module, ScoringBatch], Tensor]
    unit: str
    counted: str


def _token_logps(model: nn.Module, batch: ScoringBatch, **options: Any) -> Tensor:
    return score(model, batch, **options).token_logps


LOG_PROBS = Measures(_token_logps, score_alone, "nats", "tokens")


@dataclass(frozen=True)
class LayoutChoice:
    """The layout a run uses, and the proof: largest difference per token from scoring alone, in nats.

    `backend` is what computes the attention of a tree; None for another layout.
    """

    layout: Layout
    backend: Backend | None
    difference: float
    line: str

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for `score`."""
        return {"layout": self.layout} | ({"backend": self.backend} if self.backend else {})


def choose_layout(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    requested: Layout | None = None,
    backend: str = "auto",
    measures: Measures = LOG_PROBS,
) -> LayoutChoice:
    """Score real examples as a tree and alone, and take the tree layout only if they agree.

    Args:
        model: the policy.
        examples: a few real ones; with two completions or more, so that a leak between them would show.
        requested: a layout that is forced; it is proved all the same.
        backend: what computes a tree's attention; `auto`: the device's first choice that is proved.
        measures: what is compared.

    Returns:
        The choice with one line to print.

    Raises:
        ScoringError: no layout gives what scoring alone gives, or the one that was forced does not.
        ConfigError: the backend that was forced cannot work here, or the layout has none.
    """
    device = next(model.parameters()).device
    batch, limit = pack(examples).to(device), tolerance(model)
    candidates = _candidates(model, requested, backend)
    with torch.no_grad(), evaluation_mode(model):
        alone = measures.alone(model, batch)
        reason = ""
        for layout, kernel in candidates:
            choice = LayoutChoice(layout, kernel, *_compare(measures, model, batch, alone, layout, kernel))
            name = f"{layout} layout" + (f", {kernel} attention" if kernel else "")
            if choice.difference <= limit:
                figure = (
                    f"{choice.difference:.1e} {measures.unit} from each sequence alone, {len(alone)} {measures.counted}"
                )
                return replace(choice, line=f"scoring: {name}, at most {figure} (allowed {limit:.0e}){reason}")
            reason += f"; {name} refused: {choice.line or f'{choice.difference:.1e} {measures.unit} off'}"
            if layout == "tree":
                remove_tree_attention(transformers_model(model))
    forced = ["`scoring_layout`"] * (requested is not None) + ["`attention_backend`"] * (backend != "auto")
    raise ScoringError(
        f"{type(transformers_model(model)).__name__} is not scored as it scores each sequence alone{reason}. "
        f"Allowed are {limit:.0e} {measures.unit}. "
        + (f"Leave {' and '.join(forced)} unset to let Tether choose." if forced else "This model is not supported.")
    )


def _candidates(model: nn.Module, requested: Layout | None, backend: str) -> list[tuple[Layout, Backend | None]]:
    """Layouts and backends to try, best first; a backend that is forced leaves trees only."""
    if requested is None and is_encoder_decoder(transformers_model(model)):
        requested = "encoder_decoder"
    if requested not in (None, "tree") and backend != "auto":
        raise ConfigError(
            f"attention_backend is {backend!r} and scoring_layout {requested!r}, whose attention is the model's own. "
            "Leave attention_backend at auto."
        )
    if requested not in (None, "tree"):
        return [(requested, None)]
    trains = any(parameter.requires_grad for parameter in model.parameters())
    kernels = backends_for(next(model.parameters()).device, gradients=trains, requested=backend)
    trees: list[tuple[Layout, Backend | None]] = [("tree", kernel) for kernel in kernels]
    return trees if requested or backend != "auto" else [*trees, ("padded", None)]


def _compare(
    measures: Measures, model: nn.Module, batch: ScoringBatch, alone: Tensor, layout: Layout, backend: Backend | None
) -> tuple[float, str]:
    """Largest difference from scoring alone, and what went wrong where nothing could be compared."""
    try:
        found = measures.packed(model, batch, layout=layout, backend=backend or "auto")
        difference = (found - alone).abs().max().item()
    except ConfigError:
        raise
    except ScoringError as error:
        return float("inf"), str(error)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        return float("inf"), f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return (difference, "") if difference == difference else (float("inf"), "not a number")
