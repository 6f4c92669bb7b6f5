"""The live display of a run: steps, loss, margin, accuracy, speed, time left; plain lines where there is no terminal.

`install_progress(trainer)` puts it in the place of transformers' own displays; see `tether.progress`.
"""

from __future__ import annotations

import atexit
import contextlib
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback

from tether.compute.memory import peak_bytes
from tether.progress import Shown, alone, board_of_cell, console, in_notebook

# What is shown, in this order: the name in a log without its `eval_` prefix, the name on the display, its format.
_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("rewards/margins", "margin", "{:.3g}"),
    ("rewards/accuracies", "accuracy", "{:.2f}"),
    ("reward", "reward", "{:.3f}"),
)
# With these figures a line of a run of some hundred steps fits a terminal of 80 columns; a bar needs a wider one.
SEPARATOR = "  "
_WIDE = 110


def install_progress(trainer: Trainer) -> ProgressDisplay:
    """Show a trainer's progress with `ProgressDisplay` in place of transformers' displays; may be called again.

    Args:
        trainer: any trainer; with `disable_tqdm` in its arguments the display is plain lines.

    Returns:
        The display; close it when training ends with an exception.
    """
    # In a notebook transformers' default is a display of its own.
    for display in {ProgressCallback, DEFAULT_PROGRESS_CALLBACK, PrinterCallback, ProgressDisplay}:
        trainer.remove_callback(display)
    display = ProgressDisplay(live=False if trainer.args.disable_tqdm else None)
    trainer.add_callback(display)
    return display


class ProgressDisplay(TrainerCallback):
    """One live line on a terminal, one display in a notebook's cell; without either, one line per log. Only the first
    process shows anything.

    Args:
        live: force the live line on or off; None: on in a notebook, and where standard error is a terminal.
        target: where to write; None: `console()`.
    """

    def __init__(self, live: bool | None = None, target: Console | None = None) -> None:
        self._console = target or console()
        self._notebook = target is None and in_notebook()
        self._live = (self._notebook or self._console.is_terminal) if live is None else live
        self._shown: Shown | None = None
        self._held = contextlib.ExitStack()
        self._training = False
        self._evaluated = 0
        self._figures = ""
        self._clock = _Clock()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Start the clock and the live line."""
        self._clock = _Clock(state.global_step)
        self._training = True
        self._start(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """What lies between steps (evaluation, saving) is not part of the tokens' speed."""
        self._clock.step_begins()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Move the bar."""
        self._clock.step_ends()
        self._refresh(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Show the figures of a training log, or of an evaluation as a line that stays."""
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            speed = logs.get("tokens_per_second")
            self._figures = SEPARATOR.join([*figures(logs, ""), *([f"{speed:.0f} tokens/s"] if speed else [])])
            if not self._live:
                self._print(self._line(state))
            self._refresh(state)
        for prefix in evaluations(logs):
            name = prefix.removesuffix("_")
            self._print(SEPARATOR.join([f"{name} at step {state.global_step}", *figures(logs, prefix)]))

    def measured(self, tokens: float, device: torch.device) -> dict[str, float]:
        """What a training log says of the machine: speed since the last one, and the most memory that was in use.

        Args:
            tokens: trained on since the beginning of the run.
            device: that computes; on a CPU the memory is the process's.
        """
        speed = self._clock.tokens_per_second(tokens)
        memory = {"memory_peak_gib": peak_bytes(device) / 2**30}
        return memory if speed is None else {"tokens_per_second": speed, **memory}

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Count evaluated batches behind the figures."""
        self._evaluated += 1
        self._start(state)
        self._refresh(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Back to training, or to nothing when an evaluation was all."""
        self._evaluated = 0
        if self._training:
            self._refresh(state)
        else:
            self.close()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Take the live line away and leave the last figures as a plain one."""
        self._training = False
        if self._shown is not None:
            self.close()
            self._print(self._line(state))

    def close(self) -> None:
        """Give the terminal back; harmless when nothing is shown."""
        atexit.unregister(self.close)
        if self._shown is not None:
            self._shown.close()
            self._shown = None
        self._held.close()

    def _start(self, state: TrainerState) -> None:
        if self._shown is not None or not self._live or not state.is_world_process_zero:
            return
        self._held.enter_context(alone())  # what takes its time within a step is not shown beside this
        self._shown = board_of_cell() if self._notebook else _LiveLine(self._console, state)
        # A script that dies of an exception must leave the terminal with its cursor.
        atexit.register(self.close)
        self._refresh(state)

    def _line(self, state: TrainerState) -> str:
        left = self._clock.seconds_left(state.global_step, state.max_steps)
        return SEPARATOR.join(
            part
            for part in (
                f"step {state.global_step}/{state.max_steps}",
                self._figures,
                f"{_duration(left)} left" if left else "",
                f"evaluating, batch {self._evaluated}" if self._evaluated else "",
            )
            if part
        )

    def _refresh(self, state: TrainerState) -> None:
        if self._shown is not None:
            self._shown.update(self._line(state), state.global_step, state.max_steps)

    def _print(self, line: str) -> None:
        if self._notebook:
            board_of_cell().keep(line)
        else:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _LiveLine:
    """The live line of a run on a terminal; with a bar, where that is wide."""

    def __init__(self, target: Console, state: TrainerState) -> None:
        bar = [BarColumn(bar_width=20)] if target.width >= _WIDE else []
        text = TextColumn("{task.description}", markup=False)
        self._progress = Progress(*bar, text, console=target, refresh_per_second=4, transient=True)
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step)
        self._progress.start()

    def update(self, text: str, done: float = 0.0, total: float | None = None) -> None:
        """Show a text, and the steps that are done."""
        self._progress.update(self._task, completed=done, description=text)

    def close(self) -> None:
        """Take it away."""
        self._progress.stop()


class _Clock:
    """Time inside steps for the speed, time over all for what is left."""

    def __init__(self, step: int = 0) -> None:
        self._begin = time.monotonic()
        self._first_step = step
        self._step_begin = self._begin
        self._busy = 0.0
        self._tokens: float | None = None if step else 0.0

    def step_begins(self) -> None:
        self._step_begin = time.monotonic()

    def step_ends(self) -> None:
        self._busy += time.monotonic() - self._step_begin

    def tokens_per_second(self, total: float | None) -> float | None:
        """Speed since the last call; `total` counts from the beginning of the run."""
        if total is None:
            return None
        before, busy = self._tokens, self._busy
        self._tokens, self._busy = total, 0.0
        # The first log of a resumed run may count tokens that this process has not seen.
        return None if before is None or busy <= 0 else (total - before) / busy

    def seconds_left(self, step: int, total: int) -> float | None:
        done = step - self._first_step
        return (time.monotonic() - self._begin) / done * (total - step) if done > 0 else None


def evaluations(logs: dict[str, Any]) -> list[str]:
    """Prefixes of the evaluations in a log, such as `eval_` or `eval_held_out_`."""
    return [
        name.removesuffix("loss")
        for name in logs
        if name.startswith("eval_") and name.endswith("_loss") and not name.endswith("aux_loss")
    ]


def figures(logs: dict[str, Any], prefix: str = "") -> list[str]:
    """Loss, margin, accuracy and reward of a log in words, where they are there.

    Args:
        logs: name to value, as the trainer logs them.
        prefix: of the names, such as `eval_`.

    Returns:
        Parts such as `loss 0.6931`.
    """
    return [f"{label} {form.format(logs[prefix + name])}" for name, label, form in _SHOWN if prefix + name in logs]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
