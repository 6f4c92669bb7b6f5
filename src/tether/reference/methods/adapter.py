"""Means `adapter_off` and `adapter_on`: the policy itself, computed without its adapter or with another one."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from tether.models.structure import adapter_on, adapters_off
from tether.reference.base import SAME, Scorer, frozen_pass
from tether.types import ReferenceIdentity, ScoringBatch


class AdapterOffReference:
    """The base weights under the policy's adapter; right only while nothing outside the adapter trains."""

    tolerance = SAME

    def __init__(self, policy: nn.Module, scorer: Scorer, identity: ReferenceIdentity) -> None:
        self._policy, self._scorer, self.identity = policy, scorer, identity

    def score(self, batch: ScoringBatch) -> Tensor:
        """See `Reference.score`."""
        with frozen_pass(self._policy), self._switched():
            return self._scorer(self._policy, batch).token_logps

    def state(self) -> dict[str, Tensor]:
        """Nothing: what is computed is frozen and belongs to the policy."""
        return {}

    def _switched(self) -> AbstractContextManager[None]:
        return adapters_off(self._policy)


class AdapterOnReference(AdapterOffReference):
    """The policy's base weights under another adapter that is loaded beside the one in training, and frozen."""

    def __init__(self, policy: nn.Module, scorer: Scorer, identity: ReferenceIdentity, name: str) -> None:
        super().__init__(policy, scorer, identity)
        self._name = name

    def _switched(self) -> AbstractContextManager[None]:
        return adapter_on(self._policy, self._name)
