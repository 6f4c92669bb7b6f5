"""A run that ends in the middle of a rollout, a reward or an update goes on to the same bits (R15, R18)."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as parquet
import pytest
import torch

from tether.rollout import tree_engine
from tether.training.online import algorithm
from training.online import even, steps, trainer, weights

SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 0.01}
SETTINGS |= {"num_iterations": 2, "beta": 0.1}
WORKER = """
import os, sys
from training import test_online_kills as kills
with kills.ending(int(sys.argv[2]), lambda: os._exit(9)):
    kills.run(sys.argv[1], resume=len(sys.argv) > 3)
"""


class Ended(BaseException):
    """What nothing catches, as a process that is killed."""


def end():
    raise Ended


def nothing():
    """Stands where a reward is called."""


@contextmanager
def ending(event: int, end: Callable[[], Any]) -> Iterator[list[str]]:
    """End at an event, counted over drawn tokens, calls of the reward and losses; gives which events there were."""
    seen: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            seen.append(name)
            if len(seen) == event:
                end()
            return call(*given, **named)

        return counting

    places = ((tree_engine, "draw", "draw"), (algorithm, "policy_gradient_loss", "loss"))
    with ExitStack() as stack:
        for module, name, said in places:
            stack.enter_context(patch.object(module, name, counted(said, getattr(module, name))))
        stack.enter_context(patch(f"{__name__}.nothing", counted("reward", nothing)))
        yield seen


def judged(completion_ids, want):
    nothing()
    return even(completion_ids, want)


def run(folder: str | Path, *, resume: bool = False) -> Any:
    made = trainer(folder, rewards=judged, **SETTINGS)
    made.train(resume_from_checkpoint=True if resume and list(Path(folder).glob("checkpoint-*")) else None)
    return made


def assert_same(made: Any, whole: Any) -> None:
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(made)[name]), name
    assert [log["loss"] for log in steps(made)] == [log["loss"] for log in steps(whole)]


@pytest.mark.slow
def test_ends_in_a_rollout_a_reward_and_an_update(tmp_path):
    """R15, R18: a draw of the second rollout, its reward, and the loss of the second and the third step."""
    with ending(0, end) as seen:
        whole = run(tmp_path / "whole")
    rewards, losses = ([place for place, name in enumerate(seen, 1) if name == one] for one in ("reward", "loss"))
    assert (len(rewards), len(losses)) == (2, 4), "two rollouts, each trained on twice"
    for event in (rewards[1] - 3, rewards[1], losses[1], losses[2]):
        folder = tmp_path / f"ended-{event}"
        with ending(event, end), pytest.raises(Ended):
            run(folder)
        if event == rewards[1]:
            kept = parquet.read_table(folder / "rollouts" / "000001-0.parquet")
            assert kept.num_rows == 8, "on disk before its reward ran"
            assert kept["rewards"].to_pylist() == [None] * 8
        assert_same(run(folder, resume=True), whole)


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment(tmp_path):
    """R15: eight random moments of a process that ends without a word, every second one again while it resumes."""
    with ending(0, end) as seen:
        whole = run(tmp_path / "whole")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for number, event in enumerate(sorted(random.Random(5).sample(range(2, len(seen)), 8))):
        folder = tmp_path / f"killed-{event}"
        command = [sys.executable, "-c", WORKER, str(folder), str(event)]
        for again in ([], ["resume"])[: 1 + number % 2]:
            ended = subprocess.run(
                [*command, *again], env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert ended.returncode in (0, 9), ended.stderr[-2000:]
        assert_same(run(folder, resume=True), whole)
