"""Losses and metrics since the last log travel in a checkpoint: a resumed run's first log is the unbroken one's."""

from __future__ import annotations

import json
from pathlib import Path

from accelerate.utils import gather_object
from transformers import Trainer

from tether.compat.trainer import continue_log, loss_since_log
from tether.training.metrics import MetricSums

WINDOW = "window.json"


def write_window(trainer: Trainer, folder: Path, sums: MetricSums) -> None:
    """Keep them, of every process; all of them call this."""
    last_logged, loss = loss_since_log(trainer)
    found = gather_object([{"last_logged": last_logged, "loss": loss, "sums": sums.state()}])
    if trainer.args.should_save:
        (folder / WINDOW).write_text(json.dumps(found) + "\n", encoding="utf-8")


def read_window(trainer: Trainer, folder: Path, sums: MetricSums) -> None:
    """Go on from them. On another number of processes the first log is of the steps since the checkpoint."""
    found = json.loads((folder / WINDOW).read_text(encoding="utf-8")) if (folder / WINDOW).is_file() else []
    if len(found) == trainer.accelerator.num_processes:
        mine = found[trainer.accelerator.process_index]
        continue_log(trainer, mine["last_logged"], mine["loss"])
        sums.load_state(mine["sums"], trainer.args.device)
