"""Method `store`: log-probabilities read from disk; what is missing is computed by another method and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tether.errors import ConfigError, StoreError
from tether.reference.base import Reference, log_probs, require_log_probs_only
from tether.reference.store.parts import Namespace
from tether.reference.store.store import Store
from tether.scoring import pack
from tether.scoring.layout.proof import TOLERANCE
from tether.types import Example, ReferenceIdentity, Scores, ScoringBatch

# A value kept in float16 is off by a 2048th part, and few tokens are less likely than e^-30.
_HALF_ROUNDING = 2e-2
# Of the largest difference that is allowed for one token, what all may differ by on average.
MEAN_SHARE = 0.1


@dataclass(frozen=True)
class StoreCheck:
    """Outcome of comparing stored values with the live reference, in nats per token."""

    completions: int
    tokens: int
    max_difference: float
    mean_difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether what is stored is what the reference says; NaN does not pass."""
        return self.max_difference <= self.tolerance and self.mean_difference <= self.tolerance * MEAN_SHARE

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "passed": self.passed}


class StoredReference(Reference):
    """Reads through: a completion that is not stored is computed by `live` and added.

    Args:
        live: the reference that computes what is missing.
        path: the store's folder or fsspec address.
        numerics: the class of arithmetic of `live`, see `numerics_class`.
        dtype: what values are kept in, `float32` or `float16`.
        device: where `live` is given batches to score.
        agree: true on every process when it is on one; for a `live` whose pass all processes must join.

    Raises:
        ConfigError: no reference, one that moves, or one whose weights nothing identifies.
    """

    def __init__(
        self,
        live: Reference,
        path: str | Path,
        numerics: str,
        *,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        if live.identity.meaning == "none" or live.identity.sync is not None:
            why = "has no reference" if live.identity.meaning == "none" else f"moves its reference {live.identity.sync}"
            raise ConfigError(
                f"The run {why}, so that no store belongs to it. Leave the store out, or use the run file that the "
                "store was made with."
            )
        if not live.identity.fingerprint or live.identity.fingerprint.startswith("served:"):
            raise ConfigError(
                f"A store for the reference {live.identity.source!r} ({live.identity.meaning}) was given, but nothing "
                "identifies its weights, so that what is stored could be another model's. Leave the store out, or name "
                "the model so that it is hashed here: `start` or `base` by a server, or a model in a folder."
            )
        self._live, self._path, self._numerics, self._dtype, self._agree = live, path, numerics, dtype, agree
        self.tolerance, self.device = live.tolerance, device
        self.forwards = 0  # passes of the live reference
        self.computed = 0  # completions that were missing
        self.store = self._opened()

    def _opened(self) -> Store:
        self.identity = replace(self.live.identity, method="store")
        return Store(self._path, Namespace(self.identity.fingerprint, self._numerics, self._dtype))

    def in_other_precisions(self) -> list[Namespace]:
        """What the store has of this very reference in another precision, in which a run would read it."""
        spaces = [
            replace(self.store.namespace, numerics=numerics, dtype=dtype)
            for numerics in _other_numerics(self._numerics)
            for dtype in ("float32", "float16")
        ]
        return self.store.kept_of(spaces)

    @property
    def live(self) -> Reference:
        """The reference that computes what is missing."""
        return self._live

    def score(self, batch: ScoringBatch, outputs: tuple[str, ...] = ()) -> Scores:
        """See `Reference.score`."""
        require_log_probs_only(outputs, "a store")
        self.follow_identity()
        lengths = torch.bincount(batch.completion_index, minlength=batch.num_completions).tolist()
        values = self._stored(batch.keys, lengths)
        if self._agree(_incomplete(values)):
            self.store.refresh(unless_recent=True)
            values = self._stored(batch.keys, lengths)
            if self._agree(_incomplete(values)):
                self._compute(batch, lengths)
                values = self._stored(batch.keys, lengths)
        found = [value for value in values if value is not None]
        if len(found) != len(values):
            raise StoreError(
                f"{len(values) - len(found)} of {len(values)} log-probabilities that were just put into the store "
                f"'{self._path}' cannot be read back. Check its disk with `tether store verify`."
            )
        token_logps = torch.from_numpy(np.concatenate(found)).to(batch.input_ids.device)
        return Scores(token_logps, batch.completion_index, batch.num_completions)

    def _stored(self, keys: Sequence[bytes], lengths: list[int]) -> list[np.ndarray | None]:
        values = self.store.get(keys)
        for value, length in zip(values, lengths, strict=True):
            if value is not None and len(value) != length:
                raise StoreError(
                    f"The store '{self._path}' has {len(value)} values for a completion of {length} scored tokens, so "
                    "it was filled by a program that makes its keys otherwise. Use another folder."
                )
        return values

    def _compute(self, batch: ScoringBatch, lengths: list[int]) -> None:
        values = log_probs(self.live, batch).float().cpu().numpy()
        self.forwards += 1
        self.computed += int((~self.store.holds(batch.keys)).sum())
        self.store.put(batch.keys, np.split(values, np.cumsum(lengths)[:-1]))

    def follow_identity(self) -> None:
        """Resuming may give a snapshot the tensors, and so the fingerprint, of its checkpoint."""
        if self.live.identity.fingerprint != self.store.namespace.fingerprint:
            self.store.flush()
            self.store = self._opened()

    @property
    def allowed(self) -> float:
        """Nats by which a token's stored and live log-probability may differ."""
        return max(allowed_difference(self._numerics, self._dtype), self.tolerance)

    def differences(self, examples: Sequence[Example]) -> list[list[np.ndarray | None]]:
        """How far what is stored is from what the live reference says, in nats for each token.

        Args:
            examples: those of which nothing is stored are not computed.

        Returns:
            For each example, for each of its completions: `[C_k]`, or None where it is not stored.
        """
        self.follow_identity()
        kept = [example for example in examples if self.store.holds(example.keys).any()]
        found: dict[bytes, np.ndarray] = {}
        if kept:
            batch = pack(kept).to(self.device)
            lengths = torch.bincount(batch.completion_index, minlength=batch.num_completions).tolist()
            live = np.split(log_probs(self.live, batch).float().cpu().numpy(), np.cumsum(lengths)[:-1])
            for key, stored, value in zip(batch.keys, self._stored(batch.keys, lengths), live, strict=True):
                if stored is not None:
                    found[key] = np.abs(stored - value)
        return [[found.get(key) for key in example.keys] for example in examples]

    def verify(self, examples: Sequence[Example]) -> StoreCheck | None:
        """Compare what is stored of some examples with what the live reference says.

        Args:
            examples: those of which nothing is stored are left out.

        Returns:
            The comparison; None where nothing was stored.

        Raises:
            StoreError: they differ by more than rounding explains.
        """
        parts = [part for parts in self.differences(examples) for part in parts if part is not None]
        if not parts:
            return None
        apart, limit = np.concatenate(parts), self.allowed
        check = StoreCheck(len(parts), len(apart), float(apart.max()), float(apart.mean()), limit)
        if not check.passed:
            raise StoreError(
                f"The store '{self._path}' does not hold what the reference says: on {check.completions} completions a "
                f"token's log-probability differs by up to {check.max_difference:.3g} nats and by "
                f"{check.mean_difference:.3g} on average (allowed {limit:.0e} and {limit * MEAN_SHARE:.0e} in "
                f"{self._numerics}). It was filled by a program that computes otherwise, or its parts were edited. "
                "Use another folder, or delete this one and fill it again."
            )
        return check

    def state(self) -> dict[str, Tensor]:
        """See `Reference.state`."""
        return self.live.state()

    def flush(self) -> None:
        """Write what is pending."""
        self.store.flush()

    def settle(self, *, release: bool) -> None:
        """Write what is pending, find what others wrote, and on request let the reference's weights go."""
        self.store.flush()
        self.store.refresh()
        if release and self.may_release:
            self.live.release()

    @property
    def may_release(self) -> bool:
        """Whether the live reference's weights can go and come back."""
        return self.live.may_release


def _incomplete(values: Sequence[np.ndarray | None]) -> bool:
    return any(value is None for value in values)


def numerics_class(identity: ReferenceIdentity, device: str) -> str:
    """What of the arithmetic changes a log-probability beyond rounding; call it inside the run's autocast.

    Args:
        identity: of the reference; its dtype is that of the weights.
        device: type of the device, such as `cuda`.

    Returns:
        Such as `float32`, `bfloat16`, `float32 under bfloat16`, `float32 by tf32` or `float32 by a server`. Layout and
        kernel are no part of it: they agree within rounding, which each run proves.
    """
    if identity.method == "remote":
        return f"{identity.dtype} by a server"
    if torch.is_autocast_enabled(device):
        return f"{identity.dtype} under {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"
    shortened = device == "cuda" and identity.dtype == "float32" and torch.get_float32_matmul_precision() != "highest"
    return f"{identity.dtype} by tf32" if shortened else identity.dtype


def _other_numerics(numerics: str) -> list[str]:
    """The classes that weights of this dtype can be computed in on this kind of machine or another."""
    if numerics.endswith(" by a server"):
        return [numerics]
    weights = numerics.split(" ", 1)[0]
    return [weights, f"{weights} under bfloat16", f"{weights} under float16", f"{weights} by tf32"]


def allowed_difference(numerics: str, dtype: str) -> float:
    """Nats by which a token's stored and live log-probability may differ, in a class of numerics."""
    computed: Any = getattr(torch, numerics.split(" under ")[-1].split(" by ")[0], None)
    # TensorFloat-32 has the precision of float16.
    computed = torch.float16 if numerics.endswith("tf32") else computed
    limit = TOLERANCE.get(computed, TOLERANCE[torch.bfloat16])
    return limit + (_HALF_ROUNDING if dtype == "float16" else 0.0)
