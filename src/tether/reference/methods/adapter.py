"""Methods `adapter_off` and `adapter_on`: the policy itself, computed without its adapter or with another one."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from tether.models.structure import adapter_on, adapters_off
from tether.reference.base import Reference, Scorer, scored
from tether.types import ReferenceIdentity, Scores, ScoringBatch


class AdapterOffReference(Reference):
    """The base weights under the policy's adapter; right only while nothing outside the adapter trains."""

    def __init__(self, policy: nn.Module, scorer: Scorer, identity: ReferenceIdentity) -> None:
        self._policy, self._scorer, self.identity = policy, scorer, identity

    def score(self, batch: ScoringBatch, outputs: tuple[str, ...] = ()) -> Scores:
        """See `Reference.score`."""
        with self._switched():
            return scored(self._scorer, self._policy, batch, outputs)

    def _switched(self) -> AbstractContextManager[None]:
        return adapters_off(self._policy)


class AdapterOnReference(AdapterOffReference):
    """The policy's base weights under another adapter that is loaded beside the one in training, and frozen."""

    def __init__(self, policy: nn.Module, scorer: Scorer, identity: ReferenceIdentity, name: str) -> None:
        super().__init__(policy, scorer, identity)
        self._name = name

    def _switched(self) -> AbstractContextManager[None]:
        return adapter_on(self._policy, self._name)
