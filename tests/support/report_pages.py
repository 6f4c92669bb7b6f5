"""Run folders as runs write them, and pages read back from HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tether.report import write_report

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
IDENTITY = {
    "meaning": "start",
    "method": "snapshot",
    "source": "tiny",
    "revision": None,
    "dtype": "float32",
    "fingerprint": "b2:00ff",
}
GUARD = {"rows": 8, "max_difference": 2.5e-7, "tolerance": 1e-5, "passed": True}
STEP = {
    "step": 1,
    "epoch": 0.5,
    "loss": 0.69,
    "rewards/chosen": 0.1,
    "rewards/rejected": -0.1,
    "rewards/accuracies": 0.5,
    "rewards/margins": 0.2,
    "logps/chosen": -30.0,
    "logps/rejected": -31.0,
    "grad_norm": 1.0,
    "learning_rate": 5e-6,
    "num_tokens": 1200,
}


SIDE = {"tokens": [["good", 1.5], [" day", None]], "left_out": 4, "logp": -3.0, "reference_logp": -4.5}
PAIRS = {
    "set": "held_out",
    "of": 900,
    "beta": 0.1,
    "meaning": "start",
    "policy": [2.0, -1.0, 4.0],
    "reference": [-1.0, 1.0, 2.0],
    "shown": [
        {
            "why": "wrong before and right now",
            "row": 12,
            "prompt": "Say it",
            "margin": 2.0,
            "reference_margin": -1.0,
            "chosen": SIDE,
            "rejected": {**SIDE, "tokens": [["bad", -0.3]], "left_out": 0},
        }
    ],
}
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Elements, visible text and nesting of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and not {"style", "script"} & set(self._open):
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")


def run_folder(folder: Path, **files: Any) -> Path:
    """A run folder with metrics, and with the named files as JSON or text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = files.pop("metrics", [STEP, {**STEP, "step": 2, "loss": 0.6}])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in files.items():
        if name == "config":
            (folder / "config.yaml").write_text(value)
        elif name == "health":
            (folder / "health.jsonl").write_text("".join(json.dumps(line) + "\n" for line in value))
        else:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def page_of(folder: Path, **files: Any) -> Page:
    return Page(write_report(run_folder(folder, **files)).read_text(encoding="utf-8"))


def full_run() -> dict[str, Any]:
    return {
        "config": "model: tiny\nlora: {r: 16}\nobjective: {loss: sigmoid, beta: 0.1}\n",
        "reference": {"identity": IDENTITY, "guard": GUARD, "line": "reference: start by snapshot"},
        "data": {"train": {"rows": 100, "dropped": {"identical": 3}}, "eval": {"rows": 1234}},
        "evaluation": {
            "reward_accuracy": {"value": 0.71, "low": 0.65, "high": 0.77, "n": 200},
            "sentiment": {
                "before_mean": 0.1,
                "after_mean": 0.4,
                "difference": 0.3,
                "low": 0.2,
                "high": 0.4,
                "n": 50,
                "judge": "VADER",
            },
        },
        "samples": [
            {"prompt": "The film", "before": " bad", "after": " good", "score_before": -0.5, "score_after": 0.5}
        ],
        "pairs": PAIRS,
        "health": [{"step": 7, "name": "margin-zero", "line": "the margin has stayed at zero."}],
        "metrics": [STEP, {"step": 2, "eval_loss": 0.6, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 0.3}],
    }


def two_runs(folder: Path, **second: float) -> list[Path]:
    """Two runs in folders of one name, with other learning rates."""
    made = []
    for place, (rate, accuracy) in enumerate([("1.0e-5", second.get("first", 0.6)), ("5.0e-5", 0.8)]):
        result = {"value": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "n": 200}
        lines = [{**STEP, "step": step, "loss": 0.7 - 0.01 * step * (place + 1)} for step in (1, 2, 3)]
        made.append(
            run_folder(
                folder / "ab"[place] / "out",
                metrics=[*lines, {"step": 3, "eval_loss": 0.6, "eval_rewards/margins": 0.5}],
                config=f"model: tiny\ntrain: {{learning_rate: {rate}, epochs: 1}}\noutput: {place}\n",
                evaluation={"reward_accuracy": result},
            )
        )
    return made
