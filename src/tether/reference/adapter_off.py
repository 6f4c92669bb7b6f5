"""Means `adapter_off`: the policy itself, computed without its adapter. No memory, one forward."""

from __future__ import annotations

from torch import Tensor, nn

from tether.models.structure import adapters_off
from tether.reference.protocol import Scorer, frozen_pass
from tether.types import ReferenceIdentity, ScoringBatch


class AdapterOffReference:
    """The base weights under the policy's adapter; right only while nothing outside the adapter trains."""

    def __init__(self, policy: nn.Module, scorer: Scorer, identity: ReferenceIdentity) -> None:
        self._policy, self._scorer, self.identity = policy, scorer, identity

    def score(self, batch: ScoringBatch) -> Tensor:
        """See `Reference.score`."""
        with frozen_pass(self._policy), adapters_off(self._policy):
            return self._scorer(self._policy, batch).token_logps

    def state(self) -> dict[str, Tensor]:
        """Nothing: the base weights are frozen and belong to the policy."""
        return {}
