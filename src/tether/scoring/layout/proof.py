"""Prove it or do not use it: the tree layout must give what each sequence gives alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor, nn

from tether.errors import ConfigError, ScoringError
from tether.models.adapting.perturbation import perturbed, small_tensors
from tether.models.structure import dtype_of, evaluation_mode, transformers_model
from tether.scoring.attention.interface import Backend, backends_for, remove_tree_attention
from tether.scoring.batch import pack, sequence_sources, sequences
from tether.scoring.layout.encoder_decoder import is_encoder_decoder, logits_alone
from tether.scoring.layout.vision import has_images, images_alone
from tether.scoring.score import Layout, score
from tether.types import Example, ScoringBatch

# Largest difference of one token's log-probability, in nats, that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 3e-1}

# What a model raises that cannot be called as it is called here.
_CANNOT = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError)
# How strongly an adapter is perturbed for a proof: by more where a weaker noise does not show in every sequence.
_STRENGTHS = (1.0, 3.0, 10.0)
# Nats by which a perturbed adapter changes a token of each sequence, at least, for a leak of it to be plain; and what
# is none at all.
_PLAIN_EFFECT, _NONE = 0.1, 1e-6


def tolerance(model: nn.Module) -> float:
    """Nats by which two right computations of a token's log-probability may differ in the model's dtype."""
    device = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype_of(model)
    return TOLERANCE[dtype]


def score_alone(model: nn.Module, batch: ScoringBatch) -> Tensor:
    """The plainest way: each sequence in a forward of its own, all its logits, an ordinary log-softmax.

    Slow; it is what every other way is compared with.

    Returns:
        `token_logps [N]` in float32, of a model in float64 in that.
    """
    parts = []
    inner = transformers_model(model)
    if is_encoder_decoder(inner):
        pairs = logits_alone(model, inner, batch)
        return torch.cat([_log_softmax(logits).gather(-1, ids[:, None])[:, 0] for logits, ids in pairs])
    beside = images_alone(batch) if has_images(batch) else repeat({})
    for row, where, images in zip(sequences(batch), sequence_sources(batch), beside, strict=False):
        mask = torch.ones_like(row)[None]
        logits = model(input_ids=row[None], attention_mask=mask, use_cache=False, **images).logits[0]
        logits = logits[-len(row) :]  # virtual tokens of prompt tuning come first
        parts.append(_log_softmax(logits[where]).gather(-1, row[where + 1, None])[:, 0])
    return torch.cat(parts)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@dataclass(frozen=True)
class Measures:
    """What a layout is proved by: the same numbers in a layout and with each sequence alone.

    Args:
        packed: model, batch, and layout and backend as keywords, to numbers.
        alone: model and batch to the same numbers, the plainest way.
        unit: of a number; `counted`: what there is one number for.
        causal: whether a number may depend on nothing that comes after its token.
    """

    packed: Callable[..., Tensor]
    alone: Callable[[nn.Module, ScoringBatch], Tensor]
    unit: str
    counted: str
    causal: bool = False


def _token_logps(model: nn.Module, batch: ScoringBatch, **options: Any) -> Tensor:
    return score(model, batch, **options).token_logps


LOG_PROBS = Measures(_token_logps, score_alone, "nats", "tokens", causal=True)


@dataclass(frozen=True)
class LayoutChoice:
    """The layout a run uses, and the proof: largest difference per token from scoring alone, in nats.

    `backend` is what computes the attention of a tree; None for another layout.
    """

    layout: Layout
    backend: Backend | None
    difference: float
    line: str
    measures: Measures = LOG_PROBS

    @property
    def name(self) -> str:
        """As it is called in messages."""
        return f"{self.layout} layout" + (f", {self.backend} attention" if self.backend else "")

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

    An adapter is perturbed for it: one that changes nothing yet would hide that it acts otherwise in another layout.

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
    effect = _in_effect(model, batch, measures, limit)
    with torch.no_grad(), evaluation_mode(model), effect as (alone, objection, how, rounding):
        reason, limit = "", limit * rounding
        if measures.causal:
            _require_causal(model, batch, limit)
        for layout, kernel in candidates:
            found = (float("inf"), objection) if layout == "tree" and objection else None
            choice = LayoutChoice(
                layout, kernel, *(found or _compare(measures, model, batch, alone, layout, kernel)), measures
            )
            if choice.difference <= limit:
                figure = (
                    f"{choice.difference:.1e} {measures.unit} from each sequence alone, {len(alone)} {measures.counted}"
                )
                return replace(
                    choice, line=f"scoring: {choice.name}, at most {figure} (allowed {limit:.0e}){how}{reason}"
                )
            reason += f"; {choice.name} refused: {choice.line or f'{choice.difference:.1e} {measures.unit} off'}"
            if layout == "tree":
                remove_tree_attention(transformers_model(model))
    forced = ["`scoring_layout`"] * (requested is not None) + ["`attention_backend`"] * (backend != "auto")
    raise ScoringError(
        f"{type(transformers_model(model)).__name__} is not scored as it scores each sequence alone{reason}. "
        f"Allowed are {limit:.0e} {measures.unit}. "
        + (f"Leave {' and '.join(forced)} unset to let Tether choose." if forced else _unsupported(model))
    )


def _unsupported(model: nn.Module) -> str:
    if not small_tensors(model):
        return "This model is not supported."
    return (
        "An adapter of this kind acts on a sequence by what else is in its rows, padding included, or this model is "
        "not supported; it was perturbed, as it may be nothing yet. Use LoRA or another adapter that acts on each "
        "token alike."
    )


@contextmanager
def _in_effect(
    model: nn.Module, batch: ScoringBatch, measures: Measures, limit: float
) -> Iterator[tuple[Tensor, str, str, float]]:
    """Inside, an adapter changes what every sequence of the batch gets, by so much that a leak of it would show.

    Gives the numbers of each sequence alone, why a sequence could not be proved in the same row as others, words on
    what was done, and by how much more rounding may differ: an adapter that changes a number by ten nats rounds as much
    more.
    """
    alone = _alone(measures, model, batch)
    if not small_tensors(model):
        yield alone, "", "", 1.0
        return
    # One number a completion, or one a scored token.
    owner = torch.arange(len(alone)) if len(alone) == batch.num_completions else batch.completion_index
    weakest, changed = 0.0, alone
    for strength in _STRENGTHS:
        with perturbed(model, strength):
            changed = _alone(measures, model, batch)
            effects = (changed - alone).abs()
            weakest = min(effects[(owner == k).to(effects.device)].max().item() for k in owner.unique())
            if weakest >= min(5 * limit, _PLAIN_EFFECT) or strength == _STRENGTHS[-1]:
                objection = "" if weakest > _NONE else "the adapter acts on some sequences and not on others"
                yield changed, objection, ", adapter perturbed", max(1.0, effects.max().item())
                return


def _alone(measures: Measures, model: nn.Module, batch: ScoringBatch) -> Tensor:
    """What every layout is compared with; it is the plainest call of a model, and not every model can be called so."""
    try:
        found = measures.alone(model, batch)
    except _CANNOT as error:
        raise ScoringError(
            f"{type(model).__name__} ({type(transformers_model(model)).__name__}) cannot be called on one sequence of "
            f"token ids and its attention mask alone: {type(error).__name__}: {' '.join(str(error).split())[:300]} "
            "What it needs besides is not given here. Take another model, or another kind of adapter."
        ) from error
    if not found.isfinite().all():
        raise ScoringError(
            f"{type(transformers_model(model)).__name__} gives log-probabilities that are not finite, of a sequence "
            "alone: its weights, or its dtype, are at fault. Load it in float32 and look at its weights."
        )
    return found


def _require_causal(model: nn.Module, batch: ScoringBatch, limit: float) -> None:
    """A token's probability must not depend on those after it: a model that reads the whole row is no policy.

    Raises:
        ScoringError: another last token changes what is predicted before it.
    """
    inner = transformers_model(model)
    if is_encoder_decoder(inner):
        return  # its decoder is proved beside its siblings
    rows = sequences(batch)
    place = min(range(len(rows)), key=lambda i: (len(rows[i]) < 3, len(rows[i])))
    beside = next(islice(images_alone(batch), place, None)) if has_images(batch) else {}
    found = []
    for last in (rows[place][-1], (rows[place][-1] + 1) % inner.config.get_text_config().vocab_size):
        row = torch.cat([rows[place][:-1], last[None]])
        mask = torch.ones_like(row)[None]
        logits = model(input_ids=row[None], attention_mask=mask, use_cache=False, **beside).logits[0, -len(row) : -1]
        found.append(_log_softmax(logits))
    # Tokens that a head excludes have minus infinity in both, and the difference of those is NaN.
    moved = (found[0] - found[1]).where(found[0] != found[1], 0.0).abs().max().item()
    if not moved <= limit:
        raise ScoringError(
            f"{type(inner).__name__} is not causal: another last token of a sequence changes what it predicts before "
            f"that token by {moved:.2g} nats (allowed {limit:.0e}). If its configuration has is_decoder, set that to "
            "true; else take a causal language model."
        )


def prove_again(model: nn.Module, examples: Sequence[Example], choice: LayoutChoice, updates: int) -> float:
    """Compare a layout with each sequence alone once more, as the model is now.

    Args:
        model: the policy after a few updates.
        examples: real ones.
        choice: the layout that was chosen before them.
        updates: how many there were.

    Returns:
        Largest difference.

    Raises:
        ScoringError: it is more than rounding explains.
    """
    batch, limit = pack(examples).to(next(model.parameters()).device), tolerance(model)
    with torch.no_grad(), evaluation_mode(model):
        alone = _alone(choice.measures, model, batch)
        difference, reason = _compare(choice.measures, model, batch, alone, choice.layout, choice.backend)
    if not difference <= limit:
        advice = (
            "Start again with scoring_layout=padded."
            if choice.layout == "tree"
            else "This model, or its adapter, is not supported."
        )
        raise ScoringError(
            f"After {updates} updates the {choice.name} no longer gives what each sequence gives alone: "
            f"{reason or f'{difference:.1e} {choice.measures.unit} off'}, allowed are {limit:.0e}. What those updates "
            f"changed acts on a sequence by what else is in its row. {advice}"
        )
    return difference


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
    except _CANNOT as error:
        return float("inf"), f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return (difference, "") if difference == difference else (float("inf"), "not a number")
