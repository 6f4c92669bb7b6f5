"""A tiny run that commands after training are called on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Workplace
from tether.cli.main import main


class Run:
    """A tiny LoRA run of six steps with a checkpoint at the third, and what its log says."""

    def __init__(self, path: Path, *overrides: str) -> None:
        self.path = path
        self.place = Workplace(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(path)
            assert main(["train", "run.yaml", "train.learning_rate=0.02", *overrides]) == 0
        self.out = path / "out"

    def metrics(self) -> dict[str, Any]:
        """The last evaluation."""
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return next(row for row in map(json.loads, reversed(lines)) if "eval_rewards/accuracies" in row)
