"""What every reference is to the rest of the program, whatever its means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tether.models.structure import evaluation_mode
from tether.reference.spec import Sync
from tether.types import ReferenceIdentity, Scores, ScoringBatch

# The one scoring function with the run's layout bound to it, as `functools.partial(score, layout=...)`.
Scorer = Callable[[nn.Module, ScoringBatch], Scores]

# Two passes of the same kernels over the same weights differ by nothing; this leaves room for kernels that do not
# repeat to the bit, in any dtype.
SAME = 1e-5


class Reference(Protocol):
    """A policy that gives log-probabilities and takes no part in training.

    `tolerance` is how far, in nats, one of its log-probabilities may be from the same function computed here.
    """

    identity: ReferenceIdentity
    tolerance: float

    def score(self, batch: ScoringBatch) -> Tensor:
        """Log-probabilities of the batch's completion tokens: float32 `[N]` nats, without gradient, dropout off."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold because nothing else can rebuild them; empty for most means."""
        ...


@runtime_checkable
class Moving(Protocol):
    """A reference whose own copy of the weights can be drawn towards the policy (TR-DPO)."""

    sync: Sync | None
    moves: int

    def move(self, alpha: float) -> None:
        """Make the reference `alpha * policy + (1 - alpha) * reference`."""
        ...


@runtime_checkable
class Restorable(Protocol):
    """A reference that takes back what `state` gave to a checkpoint."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors, or refuse."""
        ...


@contextmanager
def frozen_pass(model: nn.Module) -> Iterator[None]:
    """How every reference pass runs: no gradient, evaluation mode."""
    with torch.no_grad(), evaluation_mode(model):
        yield
