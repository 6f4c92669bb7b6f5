"""`tether store verify PATH run.yaml`: stored values of sampled rows against the reference of a run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tether.reference import Namespace, Store
from tether.reference.store.files import PartFolder
from tether.reference.store.tools import _parts, _rows

STORE = "reference.store=log_probs"
REPORT = re.compile(r"(\d+) completions, \d+ tokens computed again by (.*): at most (\S+) nats apart, (\S+) on average")


def poison(which, by: float) -> int:
    """Change stored values and give them right checksums, as a program with a fault would; how many there are."""
    folder = PartFolder("log_probs")
    entries = {}
    for name, _, part in list(_parts(folder, {})):
        space: Namespace = part.namespace
        entries |= dict(_rows(folder, name, part))
        folder.remove([name])
    store = Store("log_probs", space)
    for number, (key, value) in enumerate(sorted(entries.items())):
        store._pending[key] = value + np.float32(by) if which(number) else value
    store.flush()
    return len(entries)


@pytest.fixture
def filled(tether, workplace):
    assert tether("precompute", "run.yaml", STORE)[0] == 0
    return workplace


def test_a_right_store_passes_and_the_report_says_what_was_compared(tether, filled):
    code, out, err = tether("store", "verify", "log_probs", "run.yaml", "output=elsewhere", "--rows", "1000")
    assert code == 0, err
    assert "48 completions, every value matches its checksum" in out
    assert "train: 24 of 24 sampled rows are stored" in out
    assert "eval: 8 of 8 sampled rows are stored" in out
    completions, reference, worst, _ = REPORT.search(out).groups()
    assert int(completions) == 64
    assert reference.startswith("model (start, b2:")
    assert float(worst) < 2e-4
    assert not Path("elsewhere").exists(), "the run is not started, and its folder is not made"


def test_one_poisoned_completion_is_found_and_named(tether, filled):
    """INV-12, 14: its checksum is right, so that only the reference tells."""
    assert poison(lambda number: number == 7, 0.25) == 48
    assert tether("store", "verify", "log_probs")[0] == 0, "negative control: checksums do not see it"
    code, out, err = tether("store", "verify", "log_probs", "run.yaml", "--rows", "1000")
    assert code == 1
    assert len(re.findall(r"wrong: (?:train|eval) row \d+, completion [01]: 0\.25 nats apart", out)) in (1, 2)
    assert "does not hold what the reference says" in err
    assert "Traceback" not in err


def test_a_small_sample_finds_a_store_that_is_wrong_throughout(tether, filled):
    poison(lambda number: True, 1e-3)
    code, out, _ = tether("store", "verify", "log_probs", "run.yaml", "--rows", "2", "--seed", "3")
    assert code == 1
    assert float(REPORT.search(out)[3]) == pytest.approx(1e-3, rel=0.1)


def test_values_that_are_off_by_little_everywhere_are_found_by_their_mean(tether, filled):
    """Each token is within rounding, all of them to one side are not."""
    poison(lambda number: True, 5e-5)
    code, out, err = tether("store", "verify", "log_probs", "run.yaml")
    assert (code, "wrong: " in out) == (1, False)
    assert "on average" in err


def test_the_draw_is_repeatable_and_no_larger_than_asked(tether, filled):
    first, again = (tether("store", "verify", "log_probs", "run.yaml", "--rows", "5")[1] for _ in range(2))
    assert first == again
    assert sum(int(number) for number in re.findall(r"of (\d+) sampled", first)) == 5


def test_a_store_of_another_model_is_named(tether, filled):
    from tiny import tiny_model

    tiny_model(seed=1).save_pretrained("model")
    code, _, err = tether("store", "verify", "log_probs", "run.yaml")
    assert code == 1
    assert "Nothing of the 32 sampled rows is in the store 'log_probs'" in err
    assert len(set(re.findall(r"b2:[0-9a-f]{40}", err))) == 2, "both references are in the message"


def test_rows_that_came_later_are_counted_as_not_stored(tether, filled):
    filled.write_rows(filled.pairs(30))
    code, out, _ = tether("store", "verify", "log_probs", "run.yaml", "--rows", "1000")
    assert (code, "train: 24 of 30 sampled rows are stored" in out) == (0, True)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["nowhere", "run.yaml"], 2, "There is no store"),
        (["log_probs", "missing.yaml"], 2, "missing.yaml"),
        (["log_probs", "run.yaml", "reference=none"], 2, "has no reference"),
        (["log_probs", "run.yaml", "reference={sync: {steps: 3}}"], 2, "moves its reference every 3 steps"),
        (["log_probs", "run.yaml", "objective.loss=simpo", "objective.beta=2"], 2, "has no reference"),
        (["log_probs", "run.yaml", "train.max_length=13"], 1, "Nothing of the"),
        (["log_probs", "run.yaml", "--rows", "0"], 2, "--rows"),
        (["log_probs", "run.yaml", "modle=x"], 2, "modle"),
    ],
)
def test_wrong_input_is_one_paragraph(argv, code, words, tether, filled):
    found, _, err = tether("store", "verify", *argv)
    assert (found, words in err, "Traceback" in err) == (code, True, False), err


@pytest.mark.slow
def test_a_store_is_filled_with_the_trainer_of_the_loss(tether, workplace):
    """KTO's rows, and the completions of its KL estimate, are all there before training."""
    workplace.edit("objective: {beta: 0.1}", "objective: {loss: kto, beta: 0.1}")
    assert tether("precompute", "run.yaml", STORE)[0] == 0
    code, _, err = tether("train", "run.yaml", STORE)
    assert code == 0, err
    assert "this process computed 0 of them in 0 passes of the reference" in err
    code, out, err = tether("store", "verify", "log_probs", "run.yaml")
    assert (code, int(REPORT.search(out)[1]) > 0) == (0, True), err
