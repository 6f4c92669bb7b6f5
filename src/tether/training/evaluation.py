"""Evaluation, for every algorithm: means over real rows, in memory that does not grow with the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from accelerate import Accelerator
from datasets import Dataset

from tether.data import is_origin
from tether.training.algorithms.base import Algorithm
from tether.training.metrics import MetricSums, sum_and_count
from tether.training.setup.data import RunData
from tether.training.step import Context, MicroBatch
from tether.types import LossOutput


def evaluate(
    outputs: Iterable[tuple[MicroBatch, LossOutput]],
    algorithm: Algorithm[Any],
    context: Context,
    router_weight: float,
    accelerator: Accelerator,
) -> tuple[dict[str, float], int]:
    """Means of the loss and the metrics.

    Args:
        outputs: of this process' micro-batches, as they are computed.
        algorithm: whose losses they are.
        context: what its `begin_evaluation` returned.
        router_weight: of the load-balancing loss, which is a term of its own.
        accelerator: of the run; every process has to call.

    Returns:
        Means over all processes by name, and the rows of this process.
    """
    sums, rows = MetricSums(), 0
    for part, output in outputs:
        sums.add(output.metrics)
        # The router's term comes last, and is among the metrics.
        terms = output.terms[:-1] if "aux_loss" in output.metrics else output.terms
        sums.add({f"loss over {term.over}": sum_and_count(term.values) for term in terms})
        rows += part.batch.num_examples
    means = sums.means(accelerator)
    parts = [name for name in means if name.startswith("loss over ")]
    means["loss"] = sum(means.pop(name) for name in parts)
    means = algorithm.complete(algorithm.end_evaluation(context, means))
    means["loss"] += router_weight * means.get("aux_loss", 0.0)
    return means, rows


def prepare_unseen(data: RunData, rows: Any, name: str = "eval") -> Any:
    """Prepare rows that were not given to the constructor: one set, or a dictionary of several."""
    if isinstance(rows, Mapping) and not is_origin(rows):
        return {key: prepare_unseen(data, part, f"{name}_{key}") for key, part in rows.items()}
    if isinstance(rows, Dataset) and "prompt_ids" in rows.column_names:
        return rows
    return data.prepare(name, rows).dataset
