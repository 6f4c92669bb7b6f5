"""Means `snapshot`: the start values of the trainable tensors, swapped in for the reference pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from tether.errors import ReferenceError
from tether.models.structure import adapters_off
from tether.reference.protocol import Scorer, frozen_pass
from tether.types import ReferenceIdentity, ScoringBatch


class SnapshotReference:
    """The policy with its trainable tensors as they were when this object was made.

    The reference pass must come before the policy's forward of a step, so that no saved activation sees the swap.

    Args:
        policy: the model in training.
        scorer: the scoring function.
        identity: what this reference is.
        tensors: name to parameter, the policy's trainable tensors; their values are copied now.
        without_adapter: compute with adapters off on top (meaning `base` beside trainable tensors outside the adapter).
        idle_adapter: the adapter changes nothing at the start, so that the fingerprint is of what is under it.
    """

    def __init__(
        self,
        policy: nn.Module,
        scorer: Scorer,
        identity: ReferenceIdentity,
        tensors: dict[str, Tensor],
        *,
        without_adapter: bool = False,
        idle_adapter: bool = False,
    ) -> None:
        self._policy, self._scorer, self.identity = policy, scorer, identity
        self._live = tensors
        self._start = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._without_adapter = without_adapter
        self.fingerprint_without_adapters = without_adapter or idle_adapter

    def score(self, batch: ScoringBatch) -> Tensor:
        """See `Reference.score`. The policy's own values come back bit for bit, also after an error."""
        with self.swapped():
            context = adapters_off(self._policy) if self._without_adapter else nullcontext()
            with frozen_pass(self._policy), context:
                return self._scorer(self._policy, batch).token_logps

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the policy holds the start values."""
        exchanged: list[str] = []
        try:
            for name in self._live:
                self._exchange(name)
                exchanged.append(name)
            # Autocast keeps the weights it has cast, and would go on with those from before the exchange.
            torch.clear_autocast_cache()
            yield
        finally:
            for name in exchanged:
                self._exchange(name)
            torch.clear_autocast_cache()

    def _exchange(self, name: str) -> None:
        # By copy, one tensor at a time: storage stays where optimizer, wrappers and hooks expect it.
        live, start = self._live[name].data, self._start[name]
        current = live.clone()
        live.copy_(start)
        start.copy_(current)

    def state(self) -> dict[str, Tensor]:
        """The start values."""
        return self._start

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take start values from a checkpoint.

        Raises:
            ReferenceError: names or shapes are not those of the trainable tensors.
        """
        ours = {name: tuple(tensor.shape) for name, tensor in self._start.items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if ours != theirs:
            odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise ReferenceError(
                f"The checkpoint's snapshot of the reference does not fit this model: {len(odd)} tensors differ, "
                f"such as {odd[0]!r} ({theirs.get(odd[0])} in the checkpoint, {ours.get(odd[0])} here). "
                "Resume with the same model, adapter and trainable tensors."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._start[name].copy_(tensor)
