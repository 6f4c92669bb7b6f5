"""The comparison with TRL: rows have the lengths they should, ratios point the right way, unequal work is caught."""

from __future__ import annotations

import importlib.util
import math
import subprocess
from pathlib import Path
from statistics import fmean, pstdev

import common
import lengths
import pytest
import vs_trl
from lengths import Profile, make_rows, tokens_per_step

from tiny import tiny_model, tiny_tokenizer


def run(*, seconds: float = 1.0, peak: float = 100.0, losses: tuple[float, ...] = (math.log(2), 0.6), tokens: int = 10):
    return {
        "step_seconds": [seconds],
        "processor_seconds": [2 * seconds],
        "peak_mib": peak,
        "losses": list(losses),
        "num_tokens": [float(tokens)] * len(losses),
    }


def test_rows_have_exactly_the_lengths_of_the_profile():
    tokenizer, profile = tiny_tokenizer(), Profile(prompt=20, completion=6, pairs=3)
    rows = make_rows(tokenizer, profile, steps=2, spread=0.0)
    assert len(rows) == 2 * 3
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert len(prompt) == 20
        for name in ("chosen", "rejected"):
            # The boundary is exact, and a trainer adds the end token.
            whole = tokenizer(row["prompt"] + row[name])["input_ids"]
            assert whole[:20] == prompt
            assert len(whole) == 20 + 6 - 1
    assert list(tokens_per_step(tokenizer, rows, 3)) == [3 * 2 * 26] * 2


def test_rows_are_ragged_by_the_spread_and_repeat_with_the_seed():
    tokenizer, profile = tiny_tokenizer(), Profile(prompt=100, completion=50, pairs=400)
    rows = make_rows(tokenizer, profile, steps=1, spread=0.5)
    found = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    assert max(found) <= lengths.LONGEST
    assert fmean(found) == pytest.approx(100, rel=0.1)
    assert pstdev(math.log(length) for length in found) == pytest.approx(0.5, rel=0.1)
    assert rows == make_rows(tokenizer, profile, steps=1, spread=0.5)
    assert rows != make_rows(tokenizer, profile, steps=1, spread=0.5, seed=1)


def test_speed_is_our_steps_over_theirs_and_memory_our_peak_over_theirs():
    runs = {"tether": [run(seconds=2, peak=300)] * 3, "trl": [run(seconds=s, peak=600) for s in (7, 8, 90)]}
    found = vs_trl.summary(runs)
    assert found["speed_ratio"] == 8 / 2
    assert found["processor_ratio"] == 8 / 2
    assert found["memory_ratio"] == 300 / 600


def test_equal_work_has_no_problems():
    runs = {"tether": [run()], "trl": [run(losses=(math.log(2) + 1e-6, 0.6 - 5e-4))]}
    assert vs_trl.check(runs, [10, 10], 1e-3) == []


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (run(tokens=11), "tokens a step"),
        (run(losses=(0.737, 0.6)), "not at ln 2"),
        (run(losses=(math.log(2), 0.602)), "apart"),
        (run(losses=(math.log(2), math.nan)), "apart"),
    ],
)
def test_unequal_work_is_a_problem(other: dict, problem: str):
    problems = vs_trl.check({"tether": [run()], "trl": [other]}, [10, 10], 1e-3)
    assert any(problem in line for line in problems)


def test_the_table_lines_up():
    lines = common.table(("name", "s"), [("a", 1.5), ("longer", 10)]).splitlines()
    assert lines == ["name      s", "------  ---", "a       1.5", "longer   10"]


def test_peak_memory_sees_an_allocation():
    before = common.peak_memory_mib()
    block = bytearray(int(before * 2**20) + 64 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    assert common.peak_memory_mib() >= before + 32


def test_the_machine_is_described():
    found = common.machine()
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0
    assert common.versions()["torch"]


def test_a_worker_that_fails_is_an_error_with_what_it_said(tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit('no such thing')")
    with pytest.raises(common.WorkerError, match="no such thing"):
        common.run_worker(script, {})


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_both_tools_do_the_same_work_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_model(vocab_size=320).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setitem(lengths.PROFILES, "tldr", Profile(20, 5, 2))
    options = vs_trl.parse(["--profiles", "tldr", "--steps", "2", "--repeats", "1", "--threads", "1"])
    found = vs_trl.compare("tldr", True, str(tmp_path), options)
    assert found["problems"] == []
    assert all(value > 0 for tool in vs_trl.TOOLS for value in found["medians"][tool].values())


def test_competitors_compute_as_long_as_they_are_asked_to():
    with vs_trl.competitors(2) as others:
        assert [other.poll() for other in others] == [None, None]
    assert all(other.poll() is not None for other in others)


def test_on_a_busy_machine_each_tool_has_its_own_threads(monkeypatch):
    """Nothing in the environment of a worker decides for it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert vs_trl.parse([]).threads == common.cores()
    options = vs_trl.parse(["--busy", "1", "--model", "small"])
    assert (options.busy, options.threads) == (1, None)
    seen: list = []

    def worker(command, *, env, **_):
        seen.append(env.get("OMP_NUM_THREADS"))
        Path(command[-1]).write_text("{}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(common.subprocess, "run", worker)
    common.run_worker(vs_trl.WORKER, {"threads": None})
    common.run_worker(vs_trl.WORKER, {"threads": 3})
    assert seen == [None, "3"]
