"""A disk that is full is said as that, nothing that was whole is lost, and a run goes on where space comes back."""

from __future__ import annotations

import os

import pytest

from faults.harness import KINDS, Home, said_clearly, tried
from tether.training.checkpoint import last_checkpoint

EVERY = int(os.environ.get("FAULTS_EVERY", "9"))


def fill_at(home: Home, number: int, about: str) -> None:
    home.clear()
    stopped = home.run(watch={"below": str(home.path), "full": number})
    assert stopped["code"] == 1, (about, stopped["said"])
    assert said_clearly(stopped), (about, stopped["said"])
    assert "no space left" in stopped["said"], (about, stopped["said"])
    done = home.go_on()
    assert done["code"] == 0, (about, done["said"])
    home.require_same(about)
    tried("the disk full from a write on")


@pytest.mark.slow
def test_the_disk_is_full_at_a_checkpoint_and_for_a_while(nursery, tmp_path):
    home = Home(nursery, tmp_path / "home", "lora")
    changes = home.unbroken()
    number, _, path = next(one for one in changes if one[1] == "write" and ".writing/checkpoint-4" in one[2])
    fill_at(home, number, path)
    home.clear()
    done = home.run(watch={"below": str(home.path), "full": number, "times": 1})
    assert done["code"] == 0, done["said"]
    assert "tried again in" in done["said"]
    home.require_same("space came back")
    tried("the disk full for a while")


@pytest.mark.faults
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in ("lora", "full", "store", "streaming", "grpo")])
def test_the_disk_is_full_at_every_write(nursery, tmp_path, kind):
    home = Home(nursery, tmp_path / "home", kind)
    writes = [one for one in home.unbroken() if one[1] in ("open", "write")]
    for number, operation, path in writes[1::EVERY]:
        fill_at(home, number, f"{kind}: {operation} {path} ({number})")
    assert last_checkpoint(home.out) is not None
