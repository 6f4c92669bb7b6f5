"""Two processes fill one store and are killed at random moments: it opens, and holds no wrong value (INV-14)."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tether import Store
from tether.reference.store.tools import compact_store, describe_store

WRITER = Path(__file__).with_name("store_writer.py")
TOTAL = 20_000
ENOUGH = 1_000


def writer_module():
    spec = importlib.util.spec_from_file_location("store_writer", WRITER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Writers:
    """Starts, kills and starts again writers in a process that has what they need imported."""

    def __init__(self, path: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(WRITER), str(path), str(TOTAL)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes)

    def ask(self, line: str) -> int:
        self._process.stdin.write(line + "\n")
        return int(self._process.stdout.readline())

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        assert self.ask(f"reap {pid}") == signal.SIGKILL

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def flushed_numbers(folder: Path) -> set[int]:
    """What the writers have said that they flushed."""
    return {
        int(number)
        for log in folder.glob("*.log")
        for line in log.read_text().splitlines(keepends=True)
        if line.endswith("\n")  # the last line may be torn, as its writer was killed
        for number in line.split()
    }


def kill_at_random(path: Path, kills: int, seed: int) -> None:
    """Two writers at work; one of them is killed `kills` times, and another takes its place."""
    chance = random.Random(seed)
    writers = Writers(path)
    try:
        numbers = iter(range(10_000))
        running = [writers.ask(f"start {next(numbers)}") for _ in range(2)]
        for _ in range(kills):
            time.sleep(chance.uniform(0.02, 0.3))
            victim = chance.randrange(2)
            writers.kill(running[victim])
            running[victim] = writers.ask(f"start {next(numbers)}")
        end = time.monotonic() + 60  # a slow machine needs longer until something is flushed
        while len(flushed_numbers(path.parent)) <= ENOUGH and time.monotonic() < end:
            time.sleep(0.1)
        for pid in running:
            writers.kill(pid)
    finally:
        writers.close()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("kills", [5, 20])
def test_killed_writers_leave_a_store_without_a_wrong_value(kills, tmp_path):
    """Everything that a writer knew to be flushed is there; what is there is right; compaction keeps it so."""
    right, path = writer_module(), tmp_path / "store"
    kill_at_random(path, kills, seed=kills)
    flushed = flushed_numbers(tmp_path)
    assert len(flushed) > ENOUGH
    for _ in range(2):
        store = Store(path, right.SPACE)
        assert store.damaged == {}
        assert describe_store(path, values=True).damaged == {}
        found = store.get([right.key_of(number) for number in range(TOTAL)])
        there = {number for number, value in enumerate(found) if value is not None}
        assert flushed <= there
        for number in there:
            np.testing.assert_array_equal(found[number], right.value_of(number))
        assert len(store) == len(there)
        compact_store(path)


def test_a_writer_that_does_not_rename_would_be_caught(tmp_path, monkeypatch):
    """Negative control: parts written in place and cut short by a kill are what the check above looks for."""
    right, path = writer_module(), tmp_path / "store"
    monkeypatch.setattr(
        "tether.reference.store.files.os.replace", lambda source, target: Path(target).write_bytes(b"ARROW1 half")
    )
    with Store(path, right.SPACE) as store:
        store.put([right.key_of(1)], [right.value_of(1)])
    assert Store(path, right.SPACE).damaged != {}
    assert Store(path, right.SPACE).get([right.key_of(1)]) == [None]
