"""A run that is killed anywhere goes on by `--resume` alone to the same bits (INV-7, INV-46).

`make faults` makes all kinds, each at every N-th change of a file (`FAULTS_EVERY`, 9) and at random moments
(`FAULTS_KILLS`, 4 a kind); the ordinary suite has a few changes of one kind.
"""

from __future__ import annotations

import os
import random
import signal

import pytest

from faults.harness import KINDS, Home, tried
from tether.training.checkpoint import last_checkpoint

EVERY, KILLS = int(os.environ.get("FAULTS_EVERY", "9")), int(os.environ.get("FAULTS_KILLS", "4"))
# Half a file can be left of these.
_TORN = ("open", "write")


def require_gone_on(home: Home, about: str) -> None:
    before = last_checkpoint(home.out)
    done = home.go_on()
    assert done["code"] == 0, (about, before, done["said"])
    home.require_same(about)


def kill_at(home: Home, change: list, *, torn: bool) -> None:
    number, operation, path = change
    about = f"{home.kind}: {'half of' if torn else 'before'} {operation} {path} ({number})"
    home.clear()
    killed = home.run(watch={"below": str(home.path), "kill": number, "torn": torn})
    if killed["code"] == 0 and ".report.html." in path:  # pages are written by the clock: there were fewer this time
        return home.require_same(about)
    assert killed["code"] == -signal.SIGKILL, (about, killed["said"])
    require_gone_on(home, about)
    tried(f"killed {'with half of a file written' if torn else 'before a change of a file'}")


@pytest.mark.slow
def test_a_run_killed_at_a_few_changes_of_files(nursery, tmp_path):
    """The last checkpoint half written, before its name, while the one before it goes, and the final save."""
    home = Home(nursery, tmp_path / "home", "lora")
    changes = home.unbroken()

    def last(operation: str, name: str) -> list:
        return next(one for one in reversed(changes) if one[1] == operation and name in one[2])

    kill_at(home, last("write", ".writing/checkpoint-4"), torn=True)
    kill_at(home, last("os.rename", ".writing/checkpoint-4"), torn=False)
    kill_at(home, last("shutil.rmtree", "out/checkpoint-2"), torn=False)
    kill_at(home, last("write", "out/adapter_model"), torn=True)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_every_change_of_a_file(nursery, tmp_path, kind):
    home = Home(nursery, tmp_path / "home", kind)
    changes = [change for change in home.unbroken() if change[1] != "os.mkdir"]
    for place, change in enumerate(changes[len(kind) % EVERY :: EVERY] if EVERY > 1 else changes):
        kill_at(home, change, torn=change[1] in _TORN and place % 2 == 0)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_random_moments(nursery, tmp_path, kind):
    """Some runs are killed twice."""
    home, draw = Home(nursery, tmp_path / "home", kind), random.Random(kind)
    home.unbroken()
    for trial in range(KILLS):
        home.clear()
        for attempt in range(1 + trial % 2):
            more = ["--resume"] if attempt and last_checkpoint(home.out) else []
            after = home.seconds * draw.uniform(0.3, 1.0)
            killed = home.run(*more, after=after)
            assert killed["code"] in (0, -signal.SIGKILL) or attempt, killed["said"]
        require_gone_on(home, f"{kind}: trial {trial}")
        tried("killed at a random moment" + ", and once more" * (trial % 2))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138), (signal.SIGINT, 130)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_run_that_is_told_to_stop(nursery, tmp_path, number, code):
    home = Home(nursery, tmp_path / "home", "lora")
    home.unbroken()
    home.clear()
    stopped = home.run(slow=0.3, after=home.seconds + 0.5, signal=number)
    assert stopped["code"] == code, stopped["said"]
    assert "--resume" in stopped["said"]
    require_gone_on(home, number.name)
    tried("told to stop by a signal")
