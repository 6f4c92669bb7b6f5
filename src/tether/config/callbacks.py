"""Callbacks that a run file names: `callbacks: {early_stopping: {patience: 3}, loss_watchdog: {threshold: 5.0}}`."""

from __future__ import annotations

import logging
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from tether.config.sections import Section, key

logger = logging.getLogger("tether")


class EarlyStopping(Section):
    """`callbacks.early_stopping:` ends a run whose evaluation gets no better, by `train.metric_for_best_model`."""

    patience: int = key(1, "Evaluations in a row without improvement after which the run ends.", "from 1", ge=1)
    threshold: float = key(0.0, "How much better counts as improvement.", "a number from 0", ge=0)


class LossWatchdog(Section):
    """`callbacks.loss_watchdog:` ends a run whose loss is too high."""

    threshold: float = key(..., "Loss above which a logged step counts.", "a number above 0", gt=0)
    patience: int = key(3, "Logged losses in a row above it after which the run ends.", "from 1", ge=1)


class Callbacks(Section):
    """`callbacks:` what may end a run early."""

    early_stopping: EarlyStopping | None = key(None, "Ends a run that gets no better; null: not.")
    loss_watchdog: LossWatchdog | None = key(None, "Ends a run whose loss is too high; null: not.")

    def make(self) -> list[TrainerCallback]:
        """The callbacks for a trainer."""
        made: list[TrainerCallback] = []
        if self.early_stopping is not None:
            made.append(EarlyStoppingCallback(self.early_stopping.patience, self.early_stopping.threshold))
        if self.loss_watchdog is not None:
            made.append(WatchLoss(self.loss_watchdog.threshold, self.loss_watchdog.patience))
        return made


class WatchLoss(TrainerCallback):
    """Ends a run after several logged losses in a row above a threshold.

    Args:
        threshold: the loss.
        patience: how many in a row.
    """

    def __init__(self, threshold: float, patience: int) -> None:
        self._threshold, self._patience, self._above = threshold, patience, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Count, and end the run."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self._above = self._above + 1 if loss > self._threshold else 0
        if self._above >= self._patience:
            logger.warning(
                f"loss watchdog: the loss was above {self._threshold:g} in {self._above} logs up to step "
                f"{state.global_step}; the run ends here."
            )
            control.should_training_stop = True
