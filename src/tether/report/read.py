"""Reading a run folder: whichever of its files exist, with words for what is broken."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tether.errors import ConfigError
from tether.report.numbers import as_number
from tether.report.sections.completions import CompletionsFile, read_completions

METRICS = "metrics.jsonl"
HEALTH = "health.jsonl"


@dataclass(frozen=True)
class Run:
    """What a run folder says of a run.

    Args:
        name: the folder's name.
        metrics: the lines of `metrics.jsonl`, at least one.
        config_text: `config.yaml` as written; None where there is none.
        config: the same, parsed; empty where that fails.
        reference: `reference.json`, or empty.
        data: `data.json`, or empty.
        evaluation: `evaluation.json`, or empty.
        samples: `samples.json`, or empty.
        completions: the last table of `completions/`; None where there is none.
        pairs: `pairs.json`, or empty.
        health: the lines of `health.jsonl`.
    """

    name: str
    metrics: list[dict[str, Any]]
    config_text: str | None
    config: dict[str, Any]
    reference: dict[str, Any]
    data: dict[str, Any]
    evaluation: dict[str, Any]
    samples: list[dict[str, Any]]
    completions: CompletionsFile | None = None
    pairs: dict[str, Any] = field(default_factory=dict)
    health: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> float:
        """The last step of which there is a log; NaN where none names one."""
        return max((as_number(line.get("step")) for line in self.metrics if "step" in line), default=float("nan"))

    @property
    def ended(self) -> bool:
        """Whether training came to its end, by its own last line."""
        return any("train_runtime" in line for line in self.metrics)

    def first(self, key: str) -> float:
        """The first value of a metric; NaN where none was logged."""
        return next((as_number(line[key]) for line in self.metrics if key in line), float("nan"))

    def last(self, key: str) -> float:
        """The last value of a metric; NaN where none was logged."""
        return next((as_number(line[key]) for line in reversed(self.metrics) if key in line), float("nan"))


def read_run(folder: Path) -> Run:
    """Read what is there.

    Args:
        folder: the run folder.

    Returns:
        The run; missing files other than the metrics are empty.

    Raises:
        ConfigError: no folder, no metrics in it, or a file that is not what its name says.
    """
    metrics = _read_metrics(folder)
    config_text, config = _read_config(folder / "config.yaml")
    return Run(
        name=folder.resolve().name,
        metrics=metrics,
        config_text=config_text,
        config=config,
        reference=_read_json(folder / "reference.json", dict),
        data=_read_json(folder / "data.json", dict),
        evaluation=_read_json(folder / "evaluation.json", dict),
        samples=[row for row in _read_json(folder / "samples.json", list) if isinstance(row, dict)],
        completions=read_completions(folder),
        pairs=_read_json(folder / "pairs.json", dict),
        health=_read_lines(folder / HEALTH, "Remove it: the page does without.") if (folder / HEALTH).is_file() else [],
    )


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    if not path.is_file():
        here = ", ".join(sorted(item.name for item in folder.iterdir())) if folder.is_dir() else ""
        found = f"The folder holds {here or 'nothing'}." if folder.is_dir() else "There is no such folder."
        raise ConfigError(
            f"No report without metrics: looked for {path}. {found} Name the folder that a run wrote (its `output`), "
            f"which has {METRICS} after the first log."
        )
    metrics = _read_lines(path, "Remove the line and try again.")
    if not metrics:
        raise ConfigError(
            f"No report without metrics: {path} is empty. Wait for the run's first log, or lower `logging_steps`."
        )
    return metrics


def _read_lines(path: Path, advice: str) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            # A run that was killed while writing, or is writing now, leaves half a line at the end.
            if number == len(lines) and rows:
                break
            raise ConfigError(f"{path}, line {number} is not JSON ({error}). {advice}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number} holds no mapping of names to values. {advice}")
        rows.append(row)
    return rows


def _read_config(path: Path) -> tuple[str | None, dict[str, Any]]:
    if not path.is_file():
        return None, {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter of a number or a date that is none
        # The page shows the text as it is; only the facts in its header need it parsed.
        parsed = None
    return text, parsed if isinstance(parsed, dict) else {}


def _read_json(path: Path, kind: type) -> Any:
    if not path.is_file():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON ({error}). Write it again, or remove it: the page does without."
        ) from error
    if not isinstance(value, kind):
        expected = {dict: "a mapping", list: "a list"}[kind]
        raise ConfigError(f"{path} holds {type(value).__name__}, not {expected}. Write it again, or remove it.")
    return value
