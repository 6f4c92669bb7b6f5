"""The terminal and the page say what `metrics.jsonl` says, to the digit that they show."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from support.report_pages import Page

CHARTS = {
    "Loss": "loss",
    "Reward margin, chosen over rejected": "rewards/margins",
    "Reward accuracy": "rewards/accuracies",
    "Gradient norm": "grad_norm",
    "Learning rate": "learning_rate",
    "Tokens per second": "tokens_per_second",
    "Most memory in use, GiB": "memory_peak_gib",
}


def agrees(shown: str, value: float) -> bool:
    """Whether a number is the value, rounded to as many digits as are shown."""
    plain = Decimal(shown.replace("\N{MINUS SIGN}", "-").replace(",", ""))
    return abs(plain - Decimal(value)) <= Decimal((0, (5,), int(plain.as_tuple().exponent) - 1)) * Decimal("1.000001")


def test_a_digit_more_or_another_is_noticed() -> None:
    assert agrees("0.6931", 0.69314)
    assert agrees("1,235", 1234.6)
    assert not agrees("0.6931", 0.69318)
    assert not agrees("0.69310", 0.69314)


def test_terminal_and_page_agree_with_the_metrics(workplace: Any, tether: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = tether("train", "run.yaml", "train.save_strategy=no")
    assert code == 0, err
    run = workplace.path / "out"
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logs if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]

    printed = re.findall(r"^step (\d)/6  loss (\S+)  margin (\S+)  accuracy (\S+)  (\S+) tokens/s", err, re.MULTILINE)
    assert len(printed) == 6
    keys = ("step", "loss", "rewards/margins", "rewards/accuracies", "tokens_per_second")
    for shown, line in zip(printed, steps, strict=True):
        assert [agrees(text, line[key]) for text, key in zip(shown, keys, strict=True)] == [True] * 5, (shown, line)
    evaluated = re.findall(r"^eval at step 6  loss (\S+)  margin (\S+)  accuracy (\S+)", err, re.MULTILINE)[-1]
    held_out = next(line for line in reversed(logs) if "eval_loss" in line)
    for text, key in zip(evaluated, ("loss", "rewards/margins", "rewards/accuracies"), strict=True):
        assert agrees(text, held_out[f"eval_{key}"])

    source = (run / "report.html").read_text(encoding="utf-8")
    charts = {}
    for figure in re.findall(r"<figure.*?</figure>", source, re.DOTALL):
        pointer = next(value for name, value in Page(figure).attributes if name == "data-pointer")
        charts[re.findall("<b>(.*?)</b>", figure)[0]] = json.loads(pointer or "")
    for title, key in CHARTS.items():
        (train,) = [line for line in charts[title]["s"] if line["n"] == "train"]
        for step, line in zip(range(6), steps, strict=True):
            if key in line:
                assert agrees(train["t"][step], line[key]), (title, step)
    result = json.loads((run / "evaluation.json").read_text())["reward_accuracy"]["value"]
    (card,) = re.findall(r'<h2>Reward accuracy</h2><p class="figure">(.*?)</p>', source)
    assert agrees(card, result)
    assert result == held_out["eval_rewards/accuracies"]
    assert len(json.loads((run / "pairs.json").read_text())["policy"]) == 8
    assert "Which words moved the margin" in source
