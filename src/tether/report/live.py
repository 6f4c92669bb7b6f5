"""Writes the page while a run goes on. Not imported by the page itself, which needs no transformers."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tether.errors import ConfigError
from tether.report.page import write_report

logger = logging.getLogger("tether")
_SECONDS = 30.0


class PageWriter(TrainerCallback):
    """Writes `report.html`: while a run trains at a log, at most every half a minute; when it has trained, at once.

    It comes after what writes the metrics.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, -_SECONDS
        self._training = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """From here on logs follow each other closely."""
        self._training = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """The page of the whole run; the last log was before."""
        self._training = False
        self._write(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Write the page, where it is time; an evaluation after training is on it at once."""
        if not self._training or time.monotonic() - self._written >= _SECONDS:
            self._write(state)

    def _write(self, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        self._written = time.monotonic()
        try:
            write_report(self._folder)
        except (ConfigError, OSError) as error:
            # A page is no reason to end a run; the command that writes it at the end says so again.
            logger.warning(f"report: not written at step {state.global_step}: {error}")
