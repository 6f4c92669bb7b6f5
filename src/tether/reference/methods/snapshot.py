"""Method `snapshot`: the start values of the trainable tensors, swapped in for the reference pass; it can also move."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tether.compat.deepspeed import whole_size
from tether.errors import ReferencePolicyError
from tether.reference.base import Reference, Scorer, scored
from tether.reference.methods.shards import (
    gather_shards,
    local_part,
    plain_name,
    release_gathered,
    shard_like,
)
from tether.reference.methods.spill import Spill
from tether.reference.spec import Keep, Sync
from tether.types import ReferenceIdentity, Scores, ScoringBatch

logger = logging.getLogger("tether")
# A snapshot up to this share of the model is small: it travels in each checkpoint and stays in memory.
SMALL_SHARE = 0.25


class SnapshotReference(Reference):
    """The policy with its trainable tensors as they were when this object was made, or as they were moved since.

    The reference pass must come before the policy's forward of a step, so that no saved activation sees the swap.

    Args:
        policy: the model in training.
        scorer: the scoring function.
        identity: what this reference is.
        tensors: name to parameter, the policy's trainable tensors; their values are copied now.
        around: context of the pass besides the swap, such as adapters off (meaning `base` beside trainable tensors
            outside the adapter).
        keep: `device` keeps the values where the policy's are, `host` in the host's memory (pinned for a GPU).
        fingerprint: gives the identity's fingerprint while the values are swapped in; for values from a checkpoint.
        sync: how the reference moves, or None.
        spill: folder that takes the values of a large snapshot while nothing needs them; None keeps them in memory.
    """

    def __init__(
        self,
        policy: nn.Module,
        scorer: Scorer,
        identity: ReferenceIdentity,
        tensors: dict[str, Tensor],
        *,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        keep: Keep = "device",
        fingerprint: Callable[[], str] | None = None,
        sync: Sync | None = None,
        spill: Path | None = None,
    ) -> None:
        self._policy, self._scorer, self.identity = policy, scorer, identity
        self._around, self._keep, self._fingerprint, self.sync = around, keep, fingerprint, sync
        self._spill = Spill(spill) if spill is not None else None
        self._start = {plain_name(name): self._kept(tensor.detach().clone()) for name, tensor in tensors.items()}

    def score(self, batch: ScoringBatch, outputs: tuple[str, ...] = ()) -> Scores:
        """See `Reference.score`. The policy's own values come back bit for bit, also after an error."""
        with self.swapped(), self._around():
            return scored(self._scorer, self._policy, batch, outputs)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the policy holds the reference's values."""
        self._recall()
        exchanged: list[tuple[Tensor, Tensor]] = []
        live = self._live()
        try:
            for name, parameter in live.items():
                pair = local_part(parameter), self._values(name, parameter)
                _exchange(*pair)
                exchanged.append(pair)
            # Autocast keeps the weights it has cast, and would go on with those from before the exchange.
            torch.clear_autocast_cache()
            yield
        finally:
            release_gathered(self._policy)
            for pair in exchanged:
                _exchange(*pair)
            torch.clear_autocast_cache()

    @property
    def resident(self) -> bool:
        """Whether the values are in memory."""
        return not any(kept.is_meta for kept in self._start.values())

    @property
    def may_release(self) -> bool:
        """Whether it is worth while and possible to let the values go: a large snapshot that does not move."""
        return self._spill is not None and self.sync is None and not self.is_small()

    def release(self) -> None:
        """Put the values on disk; the next pass brings them back. They stay where the disk refuses."""
        if self._spill is None or not self.may_release or not self.resident:
            return
        try:
            self._start = self._spill.write(self._start)
        except OSError as error:
            logger.warning(
                f"reference: the snapshot stays in memory although the store is full, as it cannot be put on disk and "
                f"is the only copy of the start: {error}"
            )
            self._spill = None

    def _recall(self) -> None:
        if self._spill is not None and not self.resident:
            self._start = {name: self._kept(value) for name, value in self._spill.read().items()}

    def move(self, alpha: float) -> None:
        """Make the reference `alpha * policy + (1 - alpha) * reference`, tensor by tensor.

        Args:
            alpha: the policy's share; 1 makes the reference the policy as it is now.
        """
        with torch.no_grad():
            for name, parameter in self._live().items():
                kept = self._values(name, parameter)
                kept.mul_(1.0 - alpha).add_(local_part(parameter).to(kept.device), alpha=alpha)
        self.moves += 1

    def state(self) -> dict[str, Tensor]:
        """The reference's values, whole; a collective operation where the policy is sharded."""
        self._recall()
        live = self._live()
        return {name: gather_shards(kept, live[name]) for name, kept in self._start.items()}

    @property
    def travels(self) -> bool:
        """A snapshot that is most of the model and has not moved is the start model itself."""
        return bool(self.moves) or self.is_small()

    def size(self) -> int:
        """Numbers in `state()`."""
        return sum(map(whole_size, self._live().values()))

    def is_small(self) -> bool:
        """Whether it is a small part of the model, as with an adapter."""
        return self.size() <= SMALL_SHARE * sum(map(whole_size, self._policy.parameters()))

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take values from a checkpoint; the identity becomes theirs.

        Raises:
            ReferencePolicyError: names or shapes are not those of the trainable tensors.
        """
        ours = {name: tuple(tensor.shape) for name, tensor in self._start.items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if ours != theirs:
            odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            raise ReferencePolicyError(
                f"The checkpoint's snapshot of the reference does not fit this model: {len(odd)} tensors differ, "
                f"such as {odd[0]!r} ({theirs.get(odd[0])} in the checkpoint, {ours.get(odd[0])} here). "
                "Resume with the same model, adapter and trainable tensors."
            )
        self._recall()
        if self._spill is not None:
            self._spill.forget()
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._start[name].copy_(tensor)
        # A moving reference is known by where it began: its values are nobody's fingerprint.
        if self._fingerprint is not None and self.sync is None:
            with self.swapped():
                self.identity = replace(self.identity, fingerprint=self._fingerprint())

    def _live(self) -> dict[str, Tensor]:
        # Looked up each time: sharding puts other parameters in place of those that this object was made from.
        release_gathered(self._policy)
        found = {plain_name(name): parameter for name, parameter in self._policy.named_parameters()}
        missing = self._start.keys() - found.keys()
        if missing:
            raise ReferencePolicyError(
                f"{len(missing)} tensors of the snapshot are no longer in the policy, such as {min(missing)!r}: it was "
                "rebuilt after the trainer was made. Change the model before the trainer is made."
            )
        return {name: found[name] for name in self._start}

    def _values(self, name: str, parameter: Tensor) -> Tensor:
        """The kept values of a parameter, cut as it is now; the policy's values take their place during a swap."""
        kept = self._start[name]
        local = local_part(parameter)
        if kept.shape != local.shape or kept.dtype != local.dtype:
            kept = self._start[name] = self._kept(shard_like(kept, parameter))
        elif self._keep == "device" and kept.device != local.device:
            kept = self._start[name] = kept.to(local.device)
        return kept

    def _kept(self, tensor: Tensor) -> Tensor:
        if self._keep == "device":
            return tensor
        tensor = tensor.cpu()
        return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _exchange(live: Tensor, kept: Tensor) -> None:
    """Swap the values of two tensors by copy: storage stays where optimizer, wrappers and hooks expect it."""
    live = live.data
    if live.shape != kept.shape:
        raise ReferencePolicyError(
            f"A tensor of the policy has the shape {list(live.shape)} and had {list(kept.shape)} when the trainer was "
            "made, so that it cannot be put back to its start. Resize the model before the trainer is made."
        )
    current = live.clone()
    try:
        live.copy_(kept)
    except BaseException:
        live.copy_(current)
        raise
    try:
        kept.copy_(current)
    except BaseException:
        kept.copy_(live)
        live.copy_(current)
        raise
