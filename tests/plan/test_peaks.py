"""What `tether plan` says of the memory of a run, against peaks that were measured; see peaks.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plan.peaks import measured_peak, write_case
from tether.cli.main import main

MEASURED: dict[str, int] = json.loads((Path(__file__).parent / "peaks.json").read_text(encoding="utf-8"))["mib"]
NEAR = 0.15
# Cases whose plan is known to be too low: a step of an adapter on frozen weights leaves the heap of glibc in pieces,
# and the plan counts tensors alone. `malloc_trim` gave 943 of 2139 MiB back after three steps, and with
# MALLOC_MMAP_THRESHOLD_=1048576 the first step peaked at 1400 MiB in place of 2700 to 3055, several times as slow.
TOO_LOW = {"lora"}


@pytest.mark.slow  # a plan of a model of this size replays a step for 20 seconds
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason="free memory between tensors")])
        if name in TOO_LOW
        else name
        for name in MEASURED
    ],
)
def test_a_plan_is_near_the_measured_peak(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(write_case(tmp_path, name, weights=False)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peak"] / 2**20 == pytest.approx(MEASURED[name], rel=NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_the_peak_is_still_what_was_measured(name: str, tmp_path: Path) -> None:
    assert measured_peak(write_case(tmp_path, name)) / 2**20 == pytest.approx(MEASURED[name], rel=0.1)
