"""What every reference is to the rest of the program, whatever method computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from tether.errors import ReferencePolicyError
from tether.models.structure import evaluation_mode
from tether.reference.spec import Sync
from tether.scoring.divergence import with_frozen_head
from tether.types import ReferenceIdentity, Scores, ScoringBatch

# Two passes of the same kernels over the same weights differ by nothing; this leaves room for kernels that do not
# repeat to the bit, in any dtype.
SAME = 1e-5


class Scorer(Protocol):
    """The one scoring function with the run's layout bound to it, as `functools.partial(score, layout=...)`."""

    def __call__(self, model: nn.Module, batch: ScoringBatch, *, outputs: tuple[str, ...] = ()) -> Scores: ...


class Reference(ABC):
    """A policy that gives log-probabilities and is not trained.

    Attributes:
        identity: which reference it is.
        tolerance: how far, in nats, one of its log-probabilities may be from the same function computed here.
        sync: how it moves; None for one that stays.
        moves: how often it has moved.
    """

    identity: ReferenceIdentity
    tolerance: float = SAME
    sync: Sync | None = None
    moves: int = 0

    @abstractmethod
    def score(self, batch: ScoringBatch, outputs: tuple[str, ...] = ()) -> Scores | None:
        """Score a batch without gradient, with dropout off.

        Args:
            batch: K completions, N scored tokens.
            outputs: further values, see `tether.scoring.score`; a reference that runs no model here has none of them.

        Returns:
            `token_logps [N]` in float32 nats; None where there is no reference.
        """

    @property
    def live(self) -> Reference:
        """What computes: the reference itself, or the one that fills its store. Guards compare with this one."""
        return self

    @property
    def resident(self) -> bool:
        """Whether its weights are in memory, on their device."""
        return True

    @property
    def may_release(self) -> bool:
        """Whether it has weights of its own that can go, and come back when something is scored."""
        return False

    @property
    def model(self) -> nn.Module | None:
        """A model of the reference's own, apart from the policy; None without one."""
        return None

    def release(self) -> None:
        """Let the weights go; the next `score` brings them back."""

    def place(self, put: Callable[[nn.Module], nn.Module]) -> None:
        """Hold a model of its own as `put` gives it back, such as in shards."""

    def move(self, alpha: float) -> None:
        """Make the reference `alpha * policy + (1 - alpha) * reference`."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that rebuild it; empty where its source does."""
        return {}

    @property
    def travels(self) -> bool:
        """Whether checkpoints must hold `state`."""
        return True

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state` gave to a checkpoint, or refuse."""

    def flush(self) -> None:
        """Write what a store has not written yet."""


@contextmanager
def frozen_pass(model: nn.Module) -> Iterator[None]:
    """How every reference pass runs: no gradient, evaluation mode."""
    with torch.no_grad(), evaluation_mode(model):
        yield


def scored(scorer: Scorer, model: nn.Module, batch: ScoringBatch, outputs: tuple[str, ...]) -> Scores:
    """A reference pass over a model that is in place; a head that is kept for later no longer changes."""
    with frozen_pass(model):
        scores = scorer(model, batch, outputs=outputs)
        return scores if scores.head is None else with_frozen_head(scores)


def log_probs(reference: Reference, batch: ScoringBatch) -> Tensor:
    """A reference's `token_logps [N]` of a batch.

    Raises:
        ReferencePolicyError: there is no reference.
    """
    scores = reference.score(batch)
    if scores is None:
        raise ReferencePolicyError("There is no reference (meaning none), so it has no log-probabilities.")
    return scores.token_logps


def require_log_probs_only(outputs: tuple[str, ...], what: str) -> None:
    """Refuse further outputs of a reference that runs no model here.

    Raises:
        ReferencePolicyError: some were asked for.
    """
    if outputs:
        raise ReferencePolicyError(
            f"The loss takes {', '.join(outputs)} of the reference, and {what} gives log-probs of single tokens only. "
            "Set reference_method to adapter_off, snapshot or model, which run the reference here."
        )


def on_device(scores: Scores, device: torch.device) -> Scores:
    """The scores with their tensors on another device."""
    tensors = {name: value.to(device) for name, value in vars(scores).items() if isinstance(value, Tensor)}
    return replace(scores, **tensors)
