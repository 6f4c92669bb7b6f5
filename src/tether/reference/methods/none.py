"""Meaning `none`: nothing is loaded and nothing is run."""

from __future__ import annotations

from torch import Tensor

from tether.reference.base import SAME
from tether.types import ReferenceIdentity, ScoringBatch


class NoReference:
    """A flat reference that gives every completion the same log-probability, 0, so that log-ratios are log-probs."""

    tolerance = SAME
    identity = ReferenceIdentity("none", "none", "none", None, "none", "")

    def score(self, batch: ScoringBatch) -> Tensor:
        """Zeros `[N]`; no model is called."""
        return batch.targets.new_zeros(len(batch.targets)).float()

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}
