"""A store against the reference that it stands for: stored values of sampled rows, computed again."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from tether.data import example_from_row
from tether.errors import StoreError
from tether.reference.store.reference import MEAN_SHARE, StoredReference
from tether.reference.store.tools import describe_store, numerics_words


@dataclass(frozen=True)
class WrongCompletion:
    """A stored completion that is not what the reference says: where it came from, and its worst token, in nats."""

    data: str
    row: int
    completion: int
    difference: float


@dataclass
class StoreComparison:
    """Outcome of `compare_store`.

    Args:
        reference: what the values were compared with, in words.
        tolerance: nats that one token may differ by; on average a tenth of it.
        rows: sampled rows of which something is stored, by data set.
        sampled: rows that were looked up, by data set.
        completions: compared.
        tokens: compared.
        max_difference: of a token, in nats.
        mean_difference: over tokens, in nats.
        wrong: completions with a token beyond the tolerance, the worst first.
    """

    reference: str
    tolerance: float
    rows: dict[str, int] = field(default_factory=dict)
    sampled: dict[str, int] = field(default_factory=dict)
    completions: int = 0
    tokens: int = 0
    max_difference: float = 0.0
    mean_difference: float = 0.0
    wrong: list[WrongCompletion] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every compared value is the reference's, up to rounding; NaN does not pass."""
        return not self.wrong and self.mean_difference <= MEAN_SHARE * self.tolerance


def compare_store(
    stored: StoredReference, sets: Mapping[str, Dataset], *, rows: int, batch_size: int, seed: int = 0
) -> StoreComparison:
    """Compute stored log-probabilities of sampled rows again, with the reference that the store stands for.

    A store is found by the content of rows, so that the rows to compare come from data sets.

    Args:
        stored: the reference with its store.
        sets: name to prepared rows.
        rows: how many are drawn from all data sets together; all of them where there are fewer.
        batch_size: rows that the reference scores at a time.
        seed: of the draw.

    Returns:
        What was compared, and what differs.

    Raises:
        StoreError: nothing of these rows is stored.
    """
    identity = stored.live.identity
    found = StoreComparison(f"{identity.source} ({identity.meaning}, {identity.fingerprint})", stored.allowed)
    places = [(name, row) for name, one in sets.items() for row in range(len(one))]
    drawn = sorted(random.Random(seed).sample(range(len(places)), min(rows, len(places))))
    total = 0.0
    for name, one in sets.items():
        numbers = [places[i][1] for i in drawn if places[i][0] == name]
        for start in range(0, len(numbers), batch_size):
            total += _compare(found, stored, one, name, numbers[start : start + batch_size])
    if not found.completions:
        path = stored.store.folder.path
        spaces = [one.namespace for one in describe_store(path).namespaces]
        held = "; ".join(f"{space.fingerprint} in {numerics_words(space)}" for space in spaces)
        raise StoreError(
            f"Nothing of the {len(drawn)} sampled rows is in the store '{path}' for the run's reference, "
            f"{identity.fingerprint} in {numerics_words(stored.store.namespace)}. The store is of {held}. "
            "Give the run file that it was made with (model, max_length, dtype), or fill it with `tether precompute`."
        )
    found.mean_difference = total / found.tokens
    found.wrong.sort(key=lambda one: -one.difference if one.difference == one.difference else -np.inf)
    return found


def _compare(found: StoreComparison, stored: StoredReference, rows: Dataset, name: str, numbers: list[int]) -> float:
    """Add what a few rows show; the sum of their tokens' differences."""
    examples = [example_from_row(rows[i]) for i in numbers]
    found.sampled[name] = found.sampled.get(name, 0) + len(numbers)
    total = 0.0
    for number, parts in zip(numbers, stored.differences(examples), strict=True):
        found.rows[name] = found.rows.get(name, 0) + any(part is not None for part in parts)
        for completion, part in enumerate(parts):
            if part is None:
                continue
            worst = float(part.max())
            found.completions, found.tokens = found.completions + 1, found.tokens + len(part)
            # A NaN is not below the tolerance, and not above it either.
            if not worst <= found.tolerance:
                found.wrong.append(WrongCompletion(name, number, completion, worst))
            found.max_difference = float(np.fmax(found.max_difference, worst))
            total += float(part.sum())
    return total
