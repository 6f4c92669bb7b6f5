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
    """Writes `report.html` at a log, at most every half a minute; it comes after what writes the metrics.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, -_SECONDS

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Write the page, where it is time."""
        if not state.is_world_process_zero or time.monotonic() - self._written < _SECONDS:
            return
        self._written = time.monotonic()
        try:
            write_report(self._folder)
        except (ConfigError, OSError) as error:
            # A page is no reason to end a run; the command that writes it at the end says so again.
            logger.warning(f"report: not written at step {state.global_step}: {error}")
