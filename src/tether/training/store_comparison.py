"""A store against the reference that it stands for: stored values of sampled rows, computed again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from tether.data import example_from_row
from tether.errors import ConfigError, StoreError
from tether.reference import StoredReference
from tether.reference.store.reference import MEAN_SHARE
from tether.reference.store.tools import describe_store, numerics_words
from tether.training.store import evaluation_sets, open_store
from tether.training.trainer import TetherTrainer


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


def compare_store(trainer: TetherTrainer, path: str, *, rows: int, seed: int = 0) -> StoreComparison:
    """Compute stored log-probabilities of sampled rows again, with the reference of a run.

    A store is found by the content of rows, so that the rows to compare come from the run's data sets.

    Args:
        trainer: of the run; the store need not be its own.
        path: the store.
        rows: how many are drawn from all data sets together; all of them where there are fewer.
        seed: of the draw.

    Returns:
        What was compared, and what differs.

    Raises:
        ConfigError: there is no store, or the run's reference moves or is none.
        StoreError: nothing of these rows is stored.
    """
    held = describe_store(path)
    identity = trainer.run.reference.identity
    if identity.meaning == "none" or identity.sync is not None:
        why = "has no reference" if identity.meaning == "none" else f"moves its reference {identity.sync}"
        raise ConfigError(
            f"The run {why}, so that no store belongs to it. Give the run file that the store was made with."
        )
    stored = open_store(trainer.run.reference, path, trainer.args, trainer.accelerator, lambda: trainer.policy)
    found = StoreComparison(f"{identity.source} ({identity.meaning}, {identity.fingerprint})", stored.allowed)
    sets = {"train": trainer.run.source.known, **evaluation_sets(trainer.eval_dataset)}
    places = [(name, row) for name, one in sets.items() for row in range(len(one))]
    drawn = sorted(random.Random(seed).sample(range(len(places)), min(rows, len(places))))
    total = 0.0
    for name, numbers in _by_set([places[i] for i in drawn], trainer.args.per_device_eval_batch_size):
        total += _compare(found, stored, sets[name], name, numbers)
    if not found.completions:
        others = "; ".join(f"{one.namespace.fingerprint} in {numerics_words(one.namespace)}" for one in held.namespaces)
        raise StoreError(
            f"Nothing of the {len(drawn)} sampled rows is in the store '{path}' for the run's reference, "
            f"{identity.fingerprint} in {numerics_words(stored.store.namespace)}. The store is of {others}. "
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


def _by_set(places: list[tuple[str, int]], size: int) -> Iterator[tuple[str, list[int]]]:
    """Row numbers of one data set each, at most `size` at a time."""
    for name in dict.fromkeys(name for name, _ in places):
        numbers = [row for other, row in places if other == name]
        for start in range(0, len(numbers), size):
            yield name, numbers[start : start + size]
