"""The trainer whose reference fills the store; each worker makes one."""

from __future__ import annotations

from tether.config import RunConfig, build, trainer_class
from tether.training import TetherTrainer


def trainer_of(run: RunConfig) -> TetherTrainer:
    """The trainer that a run file describes."""
    arguments, adapter, keywords = build(run)
    return trainer_class(run.objective.loss)(args=arguments, peft_config=adapter, **keywords)
