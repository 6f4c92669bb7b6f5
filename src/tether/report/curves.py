"""From the lines of `metrics.jsonl` to the charts of the page."""

from __future__ import annotations

import math
from typing import Any

from tether.report.charts import Series, Style, line_chart
from tether.report.html import Html, tag
from tether.report.numbers import as_number
from tether.report.read import Run

Metrics = list[dict[str, Any]]

# Title, metric and unit of the charts behind the fold.
_MORE = (
    ("Gradient norm", "grad_norm"),
    ("Learning rate", "learning_rate"),
    ("Entropy of the policy, nats per token", "entropy"),
    ("Mean token accuracy", "mean_token_accuracy"),
    ("Mean length of sampled completions, tokens", "completions/mean_length"),
    ("Groups whose rewards are all equal", "frac_reward_zero_std"),
    ("Tokens per second", "tokens_per_second"),
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


def lines(metrics: Metrics, key: str, label: str = "", style: Style | None = None) -> list[Series]:
    """A metric in training and in each evaluation set.

    Args:
        metrics: the lines of `metrics.jsonl`.
        key: the metric's name in training.
        label: what the values are, for the legend, where a chart shows more than one metric.
        style: the colour of both; None to tell training from evaluation by colour.

    Returns:
        One series each, also where nothing was logged.
    """
    # A schedule has no noise to average away.
    found = [Series(label or "train", *curve(metrics, key), style or "train", smoothed=key != "learning_rate")]
    for name in evaluation_sets(metrics):
        prefix = f"eval_{name}_" if name else "eval_"
        title = " ".join(part for part in (label, "eval", name) if part)
        found.append(Series(title, *curve(metrics, prefix + key), style or "eval", marked=True))
    return found


def main_charts(run: Run) -> list[Html]:
    """Loss, margin, accuracy, and the rewards of chosen and rejected.

    Args:
        run: what was read.

    Returns:
        The charts that have values.
    """
    metrics = run.metrics
    objective = run.config.get("objective")
    loss = objective.get("loss") if isinstance(objective, dict) else run.config.get("loss_type")
    start = (math.log(2), "ln 2: policy equals reference") if loss in ("sigmoid", ["sigmoid"]) else None
    rewards = lines(metrics, "rewards/chosen", "chosen", "chosen") + lines(
        metrics, "rewards/rejected", "rejected", "rejected"
    )
    charts = (
        line_chart("Loss", lines(metrics, "loss"), baseline=start),
        line_chart("Reward margin, chosen over rejected", lines(metrics, "rewards/margins"), baseline=(0.0, "")),
        line_chart(
            "Reward accuracy", lines(metrics, "rewards/accuracies"), baseline=(0.5, "chance"), bounds=(0.0, 1.0)
        ),
        line_chart("Rewards", rewards, baseline=(0.0, "")),
        line_chart("Reward of sampled completions", lines(metrics, "reward")),
        line_chart("KL divergence from the reference, nats per token", lines(metrics, "kl"), baseline=(0.0, "")),
    )
    return [chart for chart in charts if chart is not None]


def more_charts(run: Run) -> Html | None:
    """Log-probabilities and the state of the optimisation, folded away.

    Args:
        run: what was read.

    Returns:
        A `details` element; None when nothing of it was logged.
    """
    metrics = run.metrics
    logps = lines(metrics, "logps/chosen", "chosen", "chosen") + lines(
        metrics, "logps/rejected", "rejected", "rejected"
    )
    charts = [line_chart("Log-probability of completions, nats", logps)]
    charts += [line_chart(title, lines(metrics, key)) for title, key in _MORE]
    drawn = [chart for chart in charts if chart is not None]
    if not drawn:
        return None
    return tag("details", tag("summary", "More curves"), tag("div", drawn, class_="charts"))
