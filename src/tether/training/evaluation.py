"""Evaluation, for every algorithm: means over real rows, in memory that does not grow with the data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, TrainingArguments

from tether.data import is_origin
from tether.errors import ConfigError, DataError
from tether.reference.base import frozen_pass
from tether.training.algorithms.base import Algorithm, Passes
from tether.training.metrics import MetricSums, sum_and_count
from tether.training.setup.data import RunData
from tether.training.setup.run import Run
from tether.training.step import Context, MicroBatch
from tether.types import LossOutput

logger = logging.getLogger("tether")
_OWN = "loss of the user's own"
# What transformers adds to the metrics of an evaluation.
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def evaluate(
    outputs: Iterable[tuple[MicroBatch, LossOutput, Tensor | None]],
    algorithm: Algorithm[Any],
    context: Context,
    router_weight: float,
    accelerator: Accelerator,
) -> tuple[dict[str, float], int]:
    """Means of the loss and the metrics.

    Args:
        outputs: of this process' micro-batches, as they are computed; each with the loss that a trainer of the user's
            own made of it, or None.
        algorithm: whose losses they are.
        context: what its `begin_evaluation` returned.
        router_weight: of the load-balancing loss, which is a term of its own.
        accelerator: of the run; every process has to call.

    Returns:
        Means over all processes by name, and the rows of this process.
    """
    sums, rows = MetricSums(), 0
    for part, output, own in outputs:
        sums.add(output.metrics)
        # The router's term comes last, and is among the metrics.
        terms = output.terms[:-1] if "aux_loss" in output.metrics else output.terms
        sums.add({f"loss over {term.over}": sum_and_count(term.values) for term in terms})
        if own is not None:
            count = _counted(output, part)
            sums.add({_OWN: (own.detach() * count, count)})
        rows += part.batch.num_examples
    means = sums.means(accelerator)
    if not means:
        raise DataError(
            "The evaluation set has no rows, so that nothing can be said of it. Give it some, or leave it out."
        )
    parts = [name for name in means if name.startswith("loss over ")]
    own_loss = means.pop(_OWN, None)
    if (square := means.pop("rewards/margins_square", None)) is not None:
        means["rewards/margins_std"] = max(0.0, square - means["rewards/margins"] ** 2) ** 0.5
    means["loss"] = sum(means.pop(name) for name in parts)
    means = algorithm.complete(algorithm.end_evaluation(context, means))
    means["loss"] += router_weight * means.get("aux_loss", 0.0)
    return means if own_loss is None else {**means, "loss": own_loss}, rows


def _counted(output: LossOutput, part: MicroBatch) -> Tensor:
    """What the loss of a micro-batch is a mean of, where that is one thing; else its examples."""
    over = {term.over for term in output.terms}
    count = len(output.terms[0].values) if len(over) == 1 else part.batch.num_examples
    return output.terms[0].values.new_tensor(float(count))


def checked_outputs(found: Any) -> tuple[Tensor, LossOutput]:
    """What `compute_loss` returned with `return_outputs`.

    Raises:
        ConfigError: a subclass returned something else than the loss and what Tether's own gave it.
    """
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], LossOutput):
        return found
    raise ConfigError(
        f"compute_loss returned {type(found).__name__} for return_outputs=True; it must return its loss and the "
        "LossOutput that super().compute_loss(..., return_outputs=True) gives, since evaluation reads metrics from it."
    )


def user_metrics(
    compute: Callable[[EvalPrediction], dict[str, float]], kept: list[dict[str, Tensor]], prefix: str
) -> dict[str, float]:
    """What a function of the user's makes of the numbers of all rows.

    Args:
        compute: takes `transformers.EvalPrediction`: `predictions` are arrays by name (log-probs of completions under
            policy and reference, rewards), `label_ids` the labels of `kto`, or 0 for the chosen one of each pair. Rows
            come in the order of the evaluation set within a process, and one process after the other.
        kept: `LossOutput.predictions` of this process' micro-batches; every process has to call.
        prefix: of the evaluation.

    Raises:
        ConfigError: it returned something else than a dictionary.
    """
    mine = [{name: values.float().cpu().numpy() for name, values in one.items()} for one in kept]
    every = gather_object(mine)
    table = {name: np.concatenate([one[name] for one in every]) for name in (every[0] if every else ())}
    rows = len(next(iter(table.values()), ()))
    labels = table.pop("label", np.zeros(rows, dtype=np.int64))
    found = compute(EvalPrediction(predictions=table, label_ids=labels))  # type: ignore[arg-type]
    if not isinstance(found, dict):
        raise ConfigError(f"compute_metrics returned a {type(found).__name__}; it must return a dictionary of numbers.")
    return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in found.items()}


def evaluated_names(
    run: Run,
    scored_loss: Callable[[nn.Module, MicroBatch, Context], LossOutput],
    policy: nn.Module,
    passes: Passes,
    accelerator: Accelerator,
) -> list[str]:
    """Names of what an evaluation of a run gives, found by evaluating a few training rows.

    Args:
        run: the run.
        scored_loss: the loss of a micro-batch.
        policy: at the start.
        passes: what the algorithm may ask for.
        accelerator: of the run; every process has to call.
    """
    part, context = MicroBatch(run.scored(run.probe)), run.algorithm.begin_evaluation(passes)
    with frozen_pass(policy), accelerator.autocast():
        output = scored_loss(policy, part, context)
    return list(evaluate([(part, output, None)], run.algorithm, context, run.router_weight, accelerator)[0])


def require_metric(wanted: str | None, known: Iterable[str], sets: Any) -> None:
    """Refuse a metric for the best model that no evaluation will give.

    Args:
        wanted: `metric_for_best_model`.
        known: names of what an evaluation gives, without a prefix.
        sets: the evaluation set, or a dictionary of several.

    Raises:
        ConfigError: with the names that there are.
    """
    if wanted is None:
        return
    parts = [f"{name}_" for name in sets] if isinstance(sets, Mapping) else [""]
    names = [f"{part}{metric}" for part in parts for metric in sorted({*known, *_TIMES})]
    if wanted.removeprefix("eval_") in names:
        return
    near = get_close_matches(wanted.removeprefix("eval_"), names, n=1)
    shown = [name for name in names if not name.endswith(_TIMES)]
    raise ConfigError(
        f"is {wanted!r}, which no evaluation gives{f' (did you mean {near[0]!r}?)' if near else ''}. There are "
        f"{', '.join(shown)}.",
        "metric_for_best_model",
    )


def announce_best(args: TrainingArguments) -> None:
    """Say which way the metric of the best model counts: transformers takes every one but a loss for better when it is
    higher, a divergence from the reference too."""
    side = "highest" if args.greater_is_better else "lowest"
    logger.info(f"best model: the one with the {side} {args.metric_for_best_model}; greater_is_better says which")


def prepare_unseen(data: RunData, rows: Any, name: str = "eval") -> Any:
    """Prepare rows that were not given to the constructor: one set, or a dictionary of several."""
    if isinstance(rows, Mapping) and not is_origin(rows):
        return {key: prepare_unseen(data, part, f"{name}_{key}") for key, part in rows.items()}
    if isinstance(rows, Dataset) and "prompt_ids" in rows.column_names:
        return rows
    return data.prepare(name, rows).dataset
