"""A command that trains begins with a heap in one piece, where that is in its power and nobody has chosen otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tether.cli import heap
from tether.cli.foreign.trl import COMMANDS


@pytest.fixture(autouse=True)
def _on_a_cpu_with_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_ACCELERATORS", ())
    monkeypatch.setattr(heap, "_is_glibc", lambda: True)
    monkeypatch.setattr(heap.sys, "gettrace", lambda: None)


def begun(*arguments: str, **environment: str) -> list[Any]:
    """What the process would begin anew with; empty where it goes on."""
    found: list[Any] = []
    heap.keep_in_one_piece(arguments, environment, lambda *anew: found.append(anew))
    return found


def test_a_command_that_trains_begins_anew_as_it_was_called() -> None:
    ((program, arguments, environment),) = begun("train", "run.yaml", HOME="/home")
    assert (program, arguments) == (sys.executable, sys.orig_argv)
    assert environment == {"HOME": "/home", "GLIBC_TUNABLES": heap.WITHOUT_CACHES, "TETHER_HEAP_IS_SET": "1"}
    assert set(COMMANDS) <= heap.TRAINS


def test_a_process_that_has_begun_anew_goes_on_and_leaves_its_children_nothing() -> None:
    environment = {"HOME": "/home", "GLIBC_TUNABLES": heap.WITHOUT_CACHES, "TETHER_HEAP_IS_SET": "1"}
    heap.keep_in_one_piece(["train"], environment, lambda *anew: pytest.fail("again"))
    assert environment == {"HOME": "/home"}


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ((), {}),
        (("plan", "train"), {}),
        (("train",), {"GLIBC_TUNABLES": "glibc.malloc.perturb=1"}),
        (("train",), {"LD_PRELOAD": "libjemalloc.so.2"}),
    ],
)
def test_other_commands_and_other_choices_are_left_alone(arguments: tuple[str, ...], environment: dict) -> None:
    assert not begun(*arguments, **environment)


@pytest.mark.parametrize("here", ["_is_glibc", "_ACCELERATORS"])
def test_where_it_has_no_effect_nothing_is_done(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, here, {"_is_glibc": lambda: False, "_ACCELERATORS": ("/",)}[here])
    assert not begun("train")


def test_the_command_itself_ends_as_it_would(tmp_path: Path) -> None:
    """Begun anew for real: the arguments, the folder and the exit code are those of the first process."""
    environment = {name: value for name, value in os.environ.items() if name not in heap._CHOSEN}
    command = [sys.executable, "-m", "tether", "train", "no such.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no such.yaml" in done.stderr
