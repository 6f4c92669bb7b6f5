"""What `tether plan` says of the memory of a run, against peaks that were measured; see peaks.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plan.peaks import measured_peak, write_case
from tether.cli.main import main

MEASURED: dict[str, int] = json.loads((Path(__file__).parent / "peaks.json").read_text(encoding="utf-8"))["mib"]
NEAR = 0.15


@pytest.mark.slow  # a plan of a model of this size replays a step for 20 seconds
@pytest.mark.parametrize("name", MEASURED)
def test_a_plan_is_near_the_measured_peak(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(write_case(tmp_path, name, weights=False)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peak"] / 2**20 == pytest.approx(MEASURED[name], rel=NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_the_peak_is_still_what_was_measured(name: str, tmp_path: Path) -> None:
    assert measured_peak(write_case(tmp_path, name)) / 2**20 == pytest.approx(MEASURED[name], rel=0.1)
