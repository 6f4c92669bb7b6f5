"""Where each process of a run is, so that a message can name the one that died or hangs (INV-46)."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from types import TracebackType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tether.compat.torch import launcher_store
from tether.errors import TetherError

logger = logging.getLogger("tether")
_BEAT_SECONDS = 1.0
# A process that says nothing new for so long is silent.
_SILENT_SECONDS = 3.0
_ANSWER_SECONDS = 5.0
# What gloo and NCCL say where another process is gone or does not answer.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out", "timed out", "timeout", "Broken pipe")


class Whereabouts(TrainerCallback):
    """Every process tells the store of the launcher each second that it lives, and in which step.

    Where a collective fails, the processes that are silent or behind are named.

    Args:
        trainer: of the run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._rank, self._size = trainer.accelerator.process_index, trainer.accelerator.num_processes
        self._key = f"tether/where/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._step = 0
        self._over = threading.Event()
        self._store: Any = None

    def __enter__(self) -> Whereabouts:
        if self._size > 1 and "MASTER_PORT" in os.environ:
            try:
                # The thread has a connection of its own: a question must not wait for what another thread says.
                self._store, told = launcher_store(_ANSWER_SECONDS), launcher_store(_ANSWER_SECONDS)
            except RuntimeError as error:
                logger.warning(f"processes: a lost one could not be named, as the launcher has no store ({error})")
                return self
            self._tell(self._store)
            threading.Thread(target=self._beat, args=(told,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._trainer.remove_callback(self)
        if self._store is not None and isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST):
            raise TetherError(
                f"The processes of this run lost each other in step {self._step + 1}: {self._missing(self._store)} "
                f"This one is rank {self._rank}, which got: {' '.join(str(error).split())[:200]}. Look at the output "
                "of the named rank and at its machine (memory ends most of them), and go on from the last checkpoint "
                "with --resume under the same launcher; ddp_timeout is how long a process is waited for."
            ) from error

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Remember the step."""
        self._step = state.global_step

    def _told(self, store: Any) -> dict[int, list[float]]:
        return {rank: json.loads(store.get(f"{self._key}/{rank}")) for rank in range(self._size)}

    def _tell(self, store: Any) -> None:
        store.set(f"{self._key}/{self._rank}", json.dumps([time.time(), self._step]))

    def _beat(self, store: Any) -> None:
        try:
            while not self._over.wait(_BEAT_SECONDS):
                self._tell(store)
        except RuntimeError:  # the store went with its process: nobody is left to tell
            return

    def _missing(self, store: Any) -> str:
        try:
            before = self._told(store)
            time.sleep(_SILENT_SECONDS)
            told = self._told(store)
        except RuntimeError:
            return "rank 0, where all of them meet, does not answer: it died or hangs."
        silent = [rank for rank in told if told[rank] == before[rank] and rank != self._rank]
        behind = [rank for rank in told if told[rank][1] < self._step]
        if silent:
            return f"{_listed(silent)} died or hangs, last heard of in step {told[silent[0]][1] + 1}."
        if behind:
            return f"{_listed(behind)} lives and is still in step {told[behind[0]][1] + 1}."
        return "all of them live; one failed with an error of its own, or a connection broke."


def _listed(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
