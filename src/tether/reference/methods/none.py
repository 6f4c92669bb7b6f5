"""Meaning `none`: nothing is loaded and nothing is run."""

from __future__ import annotations

from tether.reference.base import Reference
from tether.types import ReferenceIdentity, ScoringBatch


class NoReference(Reference):
    """No reference: log-ratios are then the policy's log-probs."""

    identity = ReferenceIdentity("none", "none", "none", None, "none", "")

    def score(self, batch: ScoringBatch, outputs: tuple[str, ...] = ()) -> None:
        """None; no model is called."""
