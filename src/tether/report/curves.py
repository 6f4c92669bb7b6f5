"""From the lines of `metrics.jsonl` to the charts of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tether.report.charts import Series, Style, line_chart
from tether.report.numbers import as_number
from tether.report.read import Run

Metrics = list[dict[str, Any]]


@dataclass(frozen=True)
class Curve:
    """One chart over the steps.

    Args:
        title: above it.
        keys: the metrics that it shows, each with a label and a colour where there are several.
        baseline: a value to mark, and what to call it.
        bounds: natural limits of the quantity.
        first: it is shown at once, and not folded.
    """

    title: str
    keys: tuple[tuple[str, str, Style | None], ...]
    baseline: tuple[float, str] | None = None
    bounds: tuple[float, float] | None = None
    first: bool = False


def _sides(name: str) -> tuple[tuple[str, str, Style | None], ...]:
    return tuple((f"{name}/{side}", side, side) for side in ("chosen", "rejected"))


CURVES = (
    Curve("Loss", (("loss", "", None),), first=True),
    Curve("Reward margin, chosen over rejected", (("rewards/margins", "", None),), (0.0, ""), first=True),
    Curve("Reward accuracy", (("rewards/accuracies", "", None),), (0.5, "chance"), (0.0, 1.0), first=True),
    Curve("Rewards", _sides("rewards"), (0.0, ""), first=True),
    Curve("Reward of sampled completions", (("reward", "", None),), first=True),
    Curve("KL divergence from the reference, nats per token", (("kl", "", None),), (0.0, ""), first=True),
    Curve(
        "KL divergence from the reference on the data, nats per token", (("kl/k3", "", None),), (0.0, ""), first=True
    ),
    Curve("Log-probability of completions, nats", _sides("logps"), first=True),
    Curve("Gradient norm", (("grad_norm", "", None),)),
    Curve("Learning rate", (("learning_rate", "", None),)),
    Curve("Entropy of the policy, nats per token", (("entropy", "", None),)),
    Curve("Mean token accuracy", (("mean_token_accuracy", "", None),)),
    Curve("Mean length of sampled completions, tokens", (("completions/mean_length", "", None),)),
    Curve("Sampled completions that were cut", (("completions/clipped_ratio", "", None),), None, (0.0, 1.0)),
    Curve("Groups whose rewards are all equal", (("frac_reward_zero_std", "", None),)),
    Curve("Tokens per second", (("tokens_per_second", "", None),)),
    Curve("Most memory in use, GiB", (("memory_peak_gib", "", None),)),
)


def curve(metrics: Metrics, key: str) -> tuple[list[float], list[float]]:
    """One metric over the steps.

    Args:
        metrics: the lines of `metrics.jsonl`.
        key: the metric's name as logged.

    Returns:
        Steps, rising, and values; where a step was logged twice (a resumed run), the later line counts.

    >>> curve([{"step": 2, "loss": 0.6}, {"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}], "loss")
    ([1.0, 2.0], [0.7, 0.5])
    """
    by_step = {as_number(line.get("step")): as_number(line[key]) for line in metrics if key in line}
    steps = sorted(step for step in by_step if math.isfinite(step))
    return steps, [by_step[step] for step in steps]


def evaluation_sets(metrics: Metrics) -> list[str]:
    """Names of the evaluation sets, as they stand in metric names; the empty string for a set without a name.

    >>> evaluation_sets([{"step": 1, "eval_a_rewards/margins": 0.0, "eval_b_rewards/margins": 0.0}])
    ['a', 'b']
    >>> evaluation_sets([{"step": 1, "eval_loss": 0.69}])
    ['']
    """
    keys = {key for line in metrics for key in line}
    ending = "rewards/margins"
    names = {
        key[len("eval_") : -len(ending)].rstrip("_") for key in keys if key.startswith("eval_") and key.endswith(ending)
    }
    return sorted(names or ({""} if "eval_loss" in keys else set()))


def lines(metrics: Metrics, key: str, sets: Sequence[str], label: str = "", style: Style | None = None) -> list[Series]:
    """A metric in training and in each evaluation set.

    Args:
        metrics: the lines of `metrics.jsonl`.
        key: the metric's name in training.
        sets: names of the evaluation sets, see `evaluation_sets`.
        label: what the values are, for the legend, where a chart shows more than one metric.
        style: the colour of both; None to tell training from evaluation by colour.

    Returns:
        One series each, also where nothing was logged.
    """
    # A schedule has no noise to average away.
    found = [Series(label or "train", *curve(metrics, key), style or "train", smoothed=key != "learning_rate")]
    for name in sets:
        prefix = f"eval_{name}_" if name else "eval_"
        title = " ".join(part for part in (label, "eval", name) if part)
        found.append(Series(title, *curve(metrics, prefix + key), style or "eval", marked=True))
    return found


def charts_of(run: Run, *, first: bool) -> list[Markup]:
    """The curves of a run.

    Args:
        run: what was read.
        first: those that are shown at once, or else those that are folded.

    Returns:
        The charts that have values.
    """
    charts, sets = [], evaluation_sets(run.metrics)
    for one in CURVES:
        if one.first != first:
            continue
        series = [line for key, label, style in one.keys for line in lines(run.metrics, key, sets, label, style)]
        baseline = _start_of_loss(run) if one.keys[0][0] == "loss" else one.baseline
        chart = line_chart(one.title, series, baseline=baseline, bounds=one.bounds)
        charts += [] if chart is None else [chart]
    return charts


def compared_charts(runs: Sequence[Run]) -> list[Markup]:
    """The curves of several runs, a colour each: training solid, the first evaluation set dashed.

    Args:
        runs: what was read of each.
    """
    charts, sets = [], [evaluation_sets(run.metrics)[:1] for run in runs]
    for one in CURVES:
        for key, label, _ in one.keys:
            title = f"{one.title}: {label}" if label else one.title
            series = [
                Series(
                    " ".join([run.name, *(["eval"] if line.marked else [])]),
                    line.steps,
                    line.values,
                    f"run{place % 8}",
                    line.marked,
                    line.smoothed,
                )
                for place, run in enumerate(runs)
                for line in lines(run.metrics, key, sets[place])
            ]
            chart = line_chart(title, series, baseline=one.baseline, bounds=one.bounds)
            charts += [] if chart is None else [chart]
    return charts


def _start_of_loss(run: Run) -> tuple[float, str] | None:
    objective = run.config.get("objective")
    loss = objective.get("loss") if isinstance(objective, dict) else run.config.get("loss_type")
    return (math.log(2), "ln 2: policy equals reference") if loss in ("sigmoid", ["sigmoid"]) else None
