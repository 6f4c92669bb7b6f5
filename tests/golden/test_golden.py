"""The numbers of training stay what they were: every trainer, every method of reference, every way of running.

`TETHER_GOLDEN_EXACT=1` compares to the bit, which holds on the machine that recorded them; otherwise to rounding.
How they are recorded, and when that is allowed: record.py.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch

from golden.cases import ONE_PROCESS, TRAINERS, TWO_PROCESSES, differences, run
from golden.launch import in_two_processes

NUMBERS = json.loads((Path(__file__).parent / "numbers.json").read_text())
EXACT = os.environ.get("TETHER_GOLDEN_EXACT") == "1"


def through_json(numbers):
    return json.loads(json.dumps(numbers))


def assert_unchanged(name, found):
    lines = differences(through_json(found), NUMBERS[name], exact=EXACT)
    assert not lines, f"{name}: {len(lines)} numbers changed, the first are\n" + "\n".join(lines[:10])


def test_the_recording_has_every_case_and_no_other():
    assert NUMBERS.keys() == {*ONE_PROCESS, *TWO_PROCESSES}


@pytest.mark.parametrize("name", ONE_PROCESS)
@pytest.mark.sweep(14)
def test_numbers_are_what_they_were(name, tmp_path):
    assert torch.get_num_threads() == 1
    assert_unchanged(name, run(ONE_PROCESS[name], tmp_path))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_numbers_of_two_processes_are_what_they_were(tmp_path):
    first, second = in_two_processes(tmp_path)
    for name, found in first.items():
        assert_unchanged(name, found)
        assert found["weights"] == second[name]["weights"], f"{name}: the processes hold other weights"


@pytest.mark.sweep(1)
@pytest.mark.parametrize("changes", [{"beta": 0.1001}, {"seed": 4}, {"learning_rate": 0.1001}])
def test_another_setting_is_noticed(changes, tmp_path):
    """Negative control: a change of a thousandth in an option, or another order of the rows."""
    found = run(TRAINERS["dpo sigmoid"].but(**changes), tmp_path)
    lines = differences(through_json(found), NUMBERS["trainer: dpo sigmoid"], exact=False)
    assert any("/weights/" in line for line in lines)
    assert any("loss" in line for line in lines)


@pytest.mark.parametrize("exact", [True, False])
def test_one_changed_number_is_noticed(exact):
    """Negative control: of a log, of a tensor, and one that is missing or new."""
    expected = NUMBERS["trainer: kto"]
    assert differences(expected, expected, exact=exact) == []
    changed = copy.deepcopy(expected)
    changed["logs"][1]["grad_norm"] *= 1 + (1e-9 if exact else 1e-3)
    tensor = next(iter(changed["weights"]))
    changed["weights"][tensor][3] += 1e-9 if exact else 1e-3 * changed["weights"][tensor][2]
    del changed["logs"][2]["loss"]
    changed["weights"]["new"] = [0.0] * 4
    places = [line.split(": ")[0] for line in differences(changed, expected, exact=exact)]
    assert sorted(places) == sorted(["/logs[1]/grad_norm", f"/weights/{tensor}[3]", "/logs[2]/loss", "/weights/new"])
