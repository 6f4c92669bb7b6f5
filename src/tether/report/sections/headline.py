"""The run in sentences: what was learnt, by which figures, and how far it has come; and facts in a few words each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tether.report.curves import evaluation_sets
from tether.report.numbers import MISSING, as_number, duration, number, signed
from tether.report.read import Run

_TIE = "\N{NO-BREAK SPACE}"


def headline(run: Run) -> list[str]:
    """What a reader wants to know first, in sentences.

    Args:
        run: what was read.
    """
    results = {name: result for name, result in run.evaluation.items() if isinstance(result, dict)}
    lines = [_accuracy(name, result) for name, result in results.items() if name.startswith("reward_accuracy")]
    lines += [_margin(name, result) for name, result in results.items() if name.startswith("reward_margin")]
    lines += [_change(name, result) for name, result in results.items() if "before_mean" in result]
    if not any(lines):
        lines.append(_last_evaluation(run))
    lines += [_sampled(run), _likelihood(run), _progress(run)]
    return [line for line in lines if line]


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run, in a few words each.

    Args:
        run: what was read.

    Returns:
        Names and values; what is not known is left out.
    """
    config = run.config
    model, objective, lora = (config.get(key) for key in ("model", "objective", "lora"))
    if isinstance(model, dict):
        model = next((model[key] for key in ("name", "path", "source") if model.get(key)), None)
    if isinstance(args := config.get("args"), dict):  # of a run that a Python script started
        objective, lora = {"loss": args.get("loss_type"), **args}, config.get("peft_config")
    objective = objective if isinstance(objective, dict) else {}
    loss = objective.get("loss")
    beta = f", β {number(objective['beta'])}" if "beta" in objective else ""
    found = [
        # Of a path the last part: a page is shown to others, and all of it stands below, in the configuration.
        ("Model", "" if not model else Path(str(model)).name if str(model).count("/") > 1 else str(model)),
        ("Objective", f"{', '.join(map(str, loss)) if isinstance(loss, list) else loss}{beta}" if loss else ""),
        ("Trained", f"LoRA, r {lora['r']}" if isinstance(lora, dict) and "r" in lora else ""),
        ("Steps", number(run.steps)),
        ("Epochs", number(run.last("epoch"))),
        ("Tokens", number(run.last("num_tokens"))),
        ("Time", duration(run.last("train_runtime"))),
    ]
    return [(name, value) for name, value in found if value and value != MISSING]


def percent(value: float) -> str:
    """A share as people say it; number and sign are not parted at the end of a line.

    >>> [percent(share).replace(_TIE, " ") for share in (0.714, 0.996, 1.0, float("nan"))]
    ['71 %', '99.6 %', '100 %', '–']
    """
    whole = 100 * as_number(value)
    return (
        MISSING
        if not math.isfinite(whole)
        else f"{number(whole, 0 if 1 <= whole <= 99 or whole in (0, 100) else 1)}{_TIE}%"
    )


def _accuracy(name: str, result: dict[str, Any]) -> str:
    value, low, high = (as_number(result.get(key)) for key in ("value", "low", "high"))
    if not math.isfinite(value):
        return ""
    chosen = name.removeprefix("reward_accuracy").strip("_")
    where = f"{number(result['n'])} held-out pairs" if "n" in result else "held-out pairs"
    where += f" of {chosen}" if chosen else ""
    # An interval of a share is not symmetric; what is said is the longer of its sides.
    either = (
        f"{_TIE}±{_TIE}{math.ceil(100 * max(high - value, value - low) - 1e-9)}" if math.isfinite(low + high) else ""
    )
    share = percent(value) + either
    return f"The policy prefers the chosen completion in {share} of {where}; by chance it would be {percent(0.5)}."


def _margin(name: str, result: dict[str, Any]) -> str:
    value, low, high = (as_number(result.get(key)) for key in ("value", "low", "high"))
    if not math.isfinite(value):
        return ""
    ending = name.removeprefix("reward_margin").strip("_")
    interval = f" (95 % interval {signed(low, 2)} to {signed(high, 2)})" if math.isfinite(low + high) else ""
    where = f" on {ending}" if ending else ""
    return f"The mean reward margin of chosen over rejected{where} is {signed(value, 2)}{interval}."


def _change(name: str, result: dict[str, Any]) -> str:
    before, after, difference, low, high = (
        as_number(result.get(key)) for key in ("before_mean", "after_mean", "difference", "low", "high")
    )
    if not math.isfinite(before + after + difference):
        return ""
    what = f"The mean {name.replace('_', ' ')}" + (f" by {result['judge']}" if result.get("judge") else "")
    verb = "rose" if low > 0 else "fell" if high < 0 else "did not change clearly, "
    of = f" on {number(result['n'])} held-out prompts" if "n" in result else ""
    interval = f" (95 % interval {signed(low, 2)} to {signed(high, 2)})" if math.isfinite(low + high) else ""
    return (
        f"{what} {verb}{' ' if verb[-1] != ' ' else ''}from {number(before, 2)} to {number(after, 2)}{of}: "
        f"{signed(difference, 2)}{interval}."
    )


def _last_evaluation(run: Run) -> str:
    for name in evaluation_sets(run.metrics):
        prefix = f"eval_{name}_" if name else "eval_"
        accuracy = run.last(f"{prefix}rewards/accuracies")
        if math.isfinite(accuracy):
            at = next(line.get("step") for line in reversed(run.metrics) if f"{prefix}rewards/accuracies" in line)
            return (
                f"At step {number(at)} the policy preferred the chosen completion in {percent(accuracy)} of the "
                f"held-out pairs{f' of {name}' if name else ''}, by the evaluation during training."
            )
    return ""


def _sampled(run: Run) -> str:
    first, last = run.first("reward"), run.last("reward")
    if not math.isfinite(first + last):
        return ""
    return f"The mean reward of sampled completions went from {number(first)} to {number(last)}."


def _likelihood(run: Run) -> str:
    first, last = run.first("logps/chosen"), run.last("logps/chosen")
    if not math.isfinite(first + last) or len([line for line in run.metrics if "logps/chosen" in line]) < 2:
        return ""
    return (
        f"In training, chosen completions went from {number(first, 1)} to {number(last, 1)} nats, between the first "
        "log and the last, which are of different rows."
    )


def _progress(run: Run) -> str:
    if run.ended:
        return ""
    return f"The run has not ended: the last log is of step {number(run.steps)}."
