"""The progress display, live, in a notebook and as plain lines."""

from __future__ import annotations

import io
import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState

from tether import progress as waiting
from tether.training import progress
from tether.training.progress import ProgressDisplay, install_progress

LOG = {"loss": 0.69314, "rewards/margins": 0.01234, "rewards/accuracies": 0.75, "num_tokens": 1000.0}


class Clock:
    """A clock that is moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def run_steps(
    display: ProgressDisplay, clock: Clock, *, steps: int, first: int = 0, process_zero: bool = True
) -> TrainerState:
    """Steps of 2 seconds with 3 seconds between them, and a log after each."""
    state = TrainerState(global_step=first, max_steps=10, is_world_process_zero=process_zero)
    arguments: Any = SimpleNamespace()
    display.on_train_begin(arguments, state, TrainerControl())
    for step in range(first + 1, first + steps + 1):
        display.on_step_begin(arguments, state, TrainerControl())
        clock.now += 2
        state.global_step = step
        display.on_step_end(arguments, state, TrainerControl())
        measured = display.measured(1000.0 * step, torch.device("cpu"))
        display.on_log(arguments, state, TrainerControl(), logs={**LOG, **measured})
        clock.now += 3
    return state


def test_plain_lines_one_per_log(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Console(file=io.StringIO(), width=20)
    display = ProgressDisplay(target=target)
    state = run_steps(display, Clock(monkeypatch), steps=2)
    display.on_log(
        SimpleNamespace(), state, TrainerControl(), logs={"eval_a_loss": 0.5, "eval_a_rewards/accuracies": 1.0}
    )  # type: ignore
    display.on_log(SimpleNamespace(), state, TrainerControl(), logs={"train_loss": 0.5})  # type: ignore
    display.on_train_end(SimpleNamespace(), state, TrainerControl())  # type: ignore
    assert target.file.getvalue().splitlines() == [  # type: ignore
        "step 1/10  loss 0.6931  margin 0.0123  accuracy 0.75  500 tokens/s  0:18 left",
        "step 2/10  loss 0.6931  margin 0.0123  accuracy 0.75  500 tokens/s  0:28 left",
        "eval_a at step 2  loss 0.5000  accuracy 1.00",
    ]


def test_a_resumed_run_knows_its_speed_from_its_second_log(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Console(file=io.StringIO())
    run_steps(ProgressDisplay(target=target), Clock(monkeypatch), steps=2, first=6)
    first, second = target.file.getvalue().splitlines()  # type: ignore
    assert "tokens/s" not in first
    assert "500 tokens/s  0:07 left" in second


def test_live_on_a_terminal_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Console(file=io.StringIO(), force_terminal=True, width=120)
    display = ProgressDisplay(target=target)
    state = run_steps(display, Clock(monkeypatch), steps=2)
    display.on_prediction_step(SimpleNamespace(), state, TrainerControl())  # type: ignore
    display.on_evaluate(SimpleNamespace(), state, TrainerControl())  # type: ignore
    display.on_train_end(SimpleNamespace(), state, TrainerControl())  # type: ignore
    text = target.file.getvalue()  # type: ignore
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert text.count(hide) == text.count(show) == 1
    assert "step 2/10  loss 0.6931" in text[text.index(show) :]
    # An evaluation after training is live too, and gives the terminal back.
    display.on_prediction_step(SimpleNamespace(), state, TrainerControl())  # type: ignore
    display.on_evaluate(SimpleNamespace(), state, TrainerControl())  # type: ignore
    assert target.file.getvalue().count(show) == 2  # type: ignore
    display.close()


def test_only_the_first_process_shows_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Console(file=io.StringIO(), force_terminal=True)
    run_steps(ProgressDisplay(target=target), Clock(monkeypatch), steps=1, process_zero=False)
    assert target.file.getvalue() == ""  # type: ignore


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What would be shown after seconds is shown at once."""
    for name in ("_PATIENCE", "_PLAIN_SECONDS", "_FLICKER", "_NOTEBOOK_SECONDS"):
        monkeypatch.setattr(waiting, name, 0.0)
    caplog.set_level(logging.INFO, "tether")
    return caplog


def test_waiting_in_a_log_is_plain_lines(impatient: pytest.LogCaptureFixture) -> None:
    with waiting.counted("preparing train", 3) as advance:
        time.sleep(0.05)
        for _ in range(3):
            advance(1)
        with waiting.working("beside it"):  # one thing at a time
            time.sleep(0.05)
    assert impatient.messages == ["preparing train …", *(f"preparing train: {n} of 3 rows" for n in (1, 2, 3))]
    impatient.clear()
    assert list(waiting.each([5, 6], "scoring")) == [5, 6]
    assert impatient.messages[-1] == "scoring: 2 of 2 batches"


def test_what_is_done_at_once_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tether")
    with waiting.working("a moment"):
        pass
    assert caplog.messages == []


def test_waiting_on_a_terminal_is_gone_afterwards(
    impatient: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(waiting, "console", lambda: target)
    with waiting.counted("preparing train", 3) as advance:
        time.sleep(0.05)
        advance(2)
    text = target.file.getvalue()  # type: ignore
    assert "preparing train" in text
    assert "2/3" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert impatient.messages == []


def test_other_processes_wait_silently(impatient: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with waiting.working("anything"):
        time.sleep(0.05)
    assert impatient.messages == []


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text


@pytest.mark.parametrize(("disable_tqdm", "live"), [(True, False), (False, True)])
def test_installing_takes_the_place_of_other_displays(
    disable_tqdm: bool, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "console", lambda: Console(file=io.StringIO(), force_terminal=True))
    trainer: Any = SimpleNamespace(args=SimpleNamespace(disable_tqdm=disable_tqdm), removed=[], added=[])
    trainer.remove_callback, trainer.add_callback = trainer.removed.append, trainer.added.append
    display = install_progress(trainer)
    assert {kind.__name__ for kind in trainer.removed} == {"ProgressCallback", "PrinterCallback", "ProgressDisplay"}
    assert trainer.added == [display]
    assert display._live is live
