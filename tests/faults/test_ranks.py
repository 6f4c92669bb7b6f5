"""A process of several that dies or hangs ends the others in bounded time, with a message that names it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from faults.harness import Home, tried
from tether.training.checkpoint import last_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.multiprocess]
_WAITED = 8  # seconds, ddp_timeout
KILLS = int(os.environ.get("FAULTS_KILLS", "4"))
# The agent of torchrun gives processes 30 seconds to end.
_LIMIT = 60


class Group:
    """A run on two processes under torchrun."""

    def __init__(self, home: Home, *more: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.said = home.path / "group.txt"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        with self.said.open("w") as out:
            self._process = subprocess.Popen(
                [*command, "-m", "tether", "train", "run.yaml", *more],
                cwd=home.path,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**environment, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        self._metrics = home.out / "metrics.jsonl"

    def until(self, step: int) -> None:
        """Wait for a logged step."""
        end = time.monotonic() + 120
        while not (self._metrics.is_file() and f'"step": {step},' in self._metrics.read_text()):
            assert self._process.poll() is None, self.said.read_text()
            assert time.monotonic() < end, self.said.read_text()
            time.sleep(0.1)

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text().rpartition(")")[2].split()[1])
                variables = (path.parent / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == self._process.pid and f"RANK={number}".encode() in variables:
                return int(path.parent.name)
        raise AssertionError(f"there is no rank {number}")

    def kill(self, after: float) -> None:
        """After some seconds, all of them at once, the launcher too, as a machine that loses its power."""
        processes = [self._process.pid, self.rank(0), self.rank(1)]
        time.sleep(after)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()

    def wait(self, seconds: float) -> tuple[int, str]:
        """Exit code and what all of them said."""
        try:
            return self._process.wait(seconds), self.said.read_text()
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)


@pytest.fixture
def home(nursery, tmp_path):
    made = Home(nursery, tmp_path / "home", "lora")
    run = yaml.safe_load((made.path / "run.yaml").read_text())
    run["train"] |= {"max_steps": 3000, "save_steps": 5, "ddp_timeout": _WAITED, "lr_scheduler_type": "constant"}
    run["train"] |= {"eval_strategy": "no", "save_total_limit": 2}
    del run["train"]["eval_steps"]
    (made.path / "run.yaml").write_text(yaml.safe_dump(run))
    return made


@pytest.mark.parametrize(
    ("rank", "number"),
    [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)],
    ids=["dies", "first dies", "hangs"],
)
def test_a_lost_process_ends_the_others_and_is_named(home, rank, number):
    group = Group(home)
    group.until(7)
    lost = group.rank(rank)
    os.kill(lost, number)
    began = time.monotonic()
    code, said = group.wait(_LIMIT + _WAITED)
    assert code != 0
    assert time.monotonic() - began < _LIMIT + _WAITED
    named = [
        line for line in said.splitlines() if f"rank {rank} died or hangs" in line or f"rank {rank}, where" in line
    ]
    assert named, said[-3000:]
    assert "--resume" in named[0]
    assert "did not expect" not in said
    kept = last_checkpoint(home.out)
    assert kept is not None
    group = Group(home, "train.max_steps=12", "--resume")
    code, said = group.wait(150)
    assert code == 0, said[-3000:]
    tried("a process of two lost")


def test_both_are_killed_and_go_on_to_the_same_bits(nursery, tmp_path):
    """With `save_total_limit: 1`, at random moments after a logged step: in a step, while saving, evaluating, at the
    end."""
    home, draw = Home(nursery, tmp_path / "home", "lora"), random.Random(0)
    code, said = Group(home).wait(150)
    assert code == 0, said[-3000:]
    home.out.rename(home.whole)
    for trial in range(KILLS):
        step, later = draw.randint(1, 6), draw.uniform(0, 0.5)
        group = Group(home)
        group.until(step)
        group.kill(later)
        kept = last_checkpoint(home.out)
        code, said = Group(home, *(["--resume"] if kept else [])).wait(150)
        about = f"trial {trial}: {later:.2f} s after step {step}, from {kept}"
        assert code == 0, (about, said[-3000:])
        home.require_same(about)
        tried("both processes of two killed")
        home.clear()


def test_both_are_told_to_stop(home):
    group = Group(home)
    group.until(7)
    for rank in (0, 1):
        os.kill(group.rank(rank), signal.SIGINT)
    code, said = group.wait(_LIMIT)
    assert code != 0
    assert "go on from it with" in said, said[-3000:]
    assert last_checkpoint(home.out) is not None
