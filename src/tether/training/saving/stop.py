"""One run at a time in a folder, and a run that is told to stop saves where it stands (INV-46)."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tether.compat.trainer import checkpoint_folder, save_checkpoint
from tether.errors import ConfigError, DataError, RewardError, RolloutError, TetherError
from tether.training.saving.atomic_checkpoint import BESIDE

logger = logging.getLogger("tether")
LOCK = ".run.lock"
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
# What is said of a lock by file systems without one (some over a network or in user space).
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_HELD: set[Path] = set()  # folders that this process has the lock of


@contextmanager
def one_run_at_a_time(folder: Path, *, main: bool) -> Iterator[None]:
    """Inside, this run has its folder for itself. The system gives the lock back when a process ends, however it ends.

    Args:
        folder: of the run.
        main: whether this process writes there; the others hold nothing.

    Raises:
        ConfigError: another run has it, or a file in it is a link.
    """
    place = folder.resolve()
    if not main or place in _HELD:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_foreign_files(folder)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"Another run trains in {folder} now: {file.read().strip() or 'it did not say which'}. Wait for it, "
                "stop it, or write elsewhere."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(f"{folder}: its file system has no locks ({error.strerror}); start no second run in it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _HELD.add(place)
        try:
            yield
        finally:
            _HELD.discard(place)
            file.truncate(0)


def _refuse_foreign_files(folder: Path) -> None:
    """What a run writes replaces its own files; a link would have it write elsewhere, and at a pipe it would wait."""
    links = sorted(
        path for path in folder.iterdir() if path.is_symlink() and (path.name == BESIDE or not path.is_dir())
    )
    if links:
        raise ConfigError(
            f"{links[0]} is a link to {links[0].readlink()}, and a run that writes there would change what it leads "
            "to. Remove the link, or write to another folder."
        )
    for path in sorted(folder.iterdir()):
        if not path.is_file() and not path.is_dir():
            raise ConfigError(
                f"{path} is a pipe, a socket or a device, at which a run would wait. Remove it, or write to another "
                "folder."
            )


class StoppedError(TetherError):
    """A signal stopped a run that had saved; the exit code is the one that shells give a process that it ends.

    Args:
        words: where the run stands.
        number: of the signal.
    """

    def __init__(self, words: str, number: int) -> None:
        super().__init__(words)
        self.exit_code = 128 + number


class StopOnSignal(TrainerCallback):
    """SIGTERM, SIGHUP, SIGINT (Ctrl-C) and SIGUSR1, which schedulers send ahead of the end, have a run save at the end
    of its step and stop; a second signal ends it at once.

    Args:
        accelerator: of the run; processes are told at different moments and must stop at the same step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._got = 0
        self._stopped = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        self._got = self._stopped = 0

    def __exit__(self, *_: object) -> None:
        self._restore()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """From here there are steps to save; other callbacks that listen to these signals have begun to by now."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._heard) for number in _SIGNALS}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Save and stop, every process at the same step."""
        number = self._got
        if self._accelerator.num_processes > 1:
            told = torch.tensor(number, device=self._accelerator.device)
            number = int(self._accelerator.gather(told.reshape(1)).max())  # type: ignore[union-attr]
        if number and state.global_step < state.max_steps:
            self._stopped = number
            control.should_save = control.should_training_stop = True

    def refuse_to_go_on(self, checkpoint: Path) -> None:
        """A run that was stopped has not finished.

        Raises:
            StoppedError: it was; with where it stands. KeyboardInterrupt after Ctrl-C, as anywhere in Python.
        """
        if self._stopped:
            name = signal.Signals(self._stopped).name
            words = (
                f"Stopped by {name} before the last step. The steps so far are saved in {checkpoint}; go on from it "
                "with --resume (in Python train(resume_from_checkpoint=True))."
            )
            raise KeyboardInterrupt(words) if self._stopped == signal.SIGINT else StoppedError(words, self._stopped)

    def _heard(self, number: int, frame: Any) -> None:
        self._got = number
        self._restore()
        logger.warning(
            f"{signal.Signals(number).name}: saving at the end of this step, then stopping; once more to leave at once"
        )

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def says_what_is_kept(trainer: Trainer, before: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Inside, an error of rows, rollouts or rewards saves the last finished step of a run, and says where.

    Args:
        trainer: of the run; outside of one nothing is saved.
        before: is done before a save.
    """
    try:
        yield
    except (DataError, RewardError, RolloutError) as error:
        before()
        raise type(error)(f"{error}{_kept_steps(trainer) if trainer.is_in_train else ''}") from error


def _kept_steps(trainer: Trainer) -> str:
    """Save the last finished step, where that was not done already, and say so."""
    folder, steps = checkpoint_folder(trainer), trainer.state.global_step
    if not steps:
        return ""
    if not folder.is_dir() and trainer.accelerator.num_processes > 1:
        return ""  # the others are in the middle of a step, and a checkpoint takes all of them
    if not folder.is_dir():
        save_checkpoint(trainer)
    return f" The {steps} steps before it are kept in {folder}: correct it and resume from there."
