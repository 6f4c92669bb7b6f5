"""Prints what the rules of health find in a run, and keeps it in `health.jsonl` in the run folder for the page."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tether.models.structure import adapter_configs
from tether.training.callbacks import StepLines
from tether.training.health.rules import Facts, Health

logger = logging.getLogger("tether")
HEALTH = "health.jsonl"
PAGE = "docs/health.md"


class Watch(TrainerCallback):
    """Looks at every training log.

    Args:
        folder: the run's.
        facts: what the run is, asked for when training begins.
    """

    def __init__(self, folder: Path, facts: Any) -> None:
        self._facts, self._health = facts, Health(Facts())
        self._file = StepLines(folder / HEALTH)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Count from where the run stands."""
        self._health = Health(self._facts(), state.global_step)
        if state.is_world_process_zero:
            self._file.begin(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Say and keep what is found."""
        logs: dict[str, float] = kwargs.get("logs") or {}
        if "loss" not in logs or not state.is_world_process_zero:
            return
        for found in self._health.look(logs, state.global_step):
            logger.warning(f"health: step {state.global_step}: {found.line} ({PAGE}#{found.name})")
            self._file.append({"step": state.global_step, "name": found.name, "line": found.line})


def facts_of(args: Any, policy: nn.Module) -> Facts:
    """What the rules ask of a run.

    Args:
        args: its configuration.
        policy: its model, as it trains.
    """
    return Facts(
        adapter=bool(adapter_configs(policy)),
        parameters=sum(one.numel() for one in policy.parameters()),
        learning_rate=args.learning_rate,
        adam="adam" in str(args.optim),
        max_grad_norm=args.max_grad_norm or 0.0,
        # Without a reference rewards are log-probabilities, times beta.
        beta=getattr(args, "beta", None) if args.kind == "pair" else None,
    )
