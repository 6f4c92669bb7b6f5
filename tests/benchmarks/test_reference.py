"""The benchmark of the reference: it compares equal work, sees a store that is not used, and runs on a tiny model."""

from __future__ import annotations

import math

import lengths
import pytest
import reference_worker
from lengths import Profile

import reference as benchmark
from tether.compute import cpu_matmul as products
from tiny import tiny_model, tiny_tokenizer

LOSSES = (math.log(2), 0.6)


def run(*, seconds=1.0, losses=LOSSES, passes=2, lookup=0.001):
    return {
        "step_seconds": [seconds],
        "losses": list(losses),
        "reference_passes": passes,
        "lookup_seconds": lookup,
        "peak_mib": 100.0,
        "resident_mib": 80.0,
    }


def test_equal_work_has_no_problems_and_targets_are_ratios():
    runs = {"adapter_off": [run(seconds=3.0)], "store-cold": [run()], "store-warm": [run(seconds=2.0, passes=0)]}
    assert benchmark.check(runs) == []
    assert [line.split(" (")[0] for line in benchmark.targets(runs)] == [
        "look-up takes 0.050% of a step",
        "a full store is 1.50x as fast as adapter_off",
    ]


@pytest.mark.parametrize(
    ("method", "wrong", "problem"),
    [
        ("store-warm", run(passes=1), "ran the reference 1 times, not 0"),
        ("store-cold", run(passes=0), "ran the reference 0 times, not 2"),
        ("store-warm", run(passes=0, losses=(0.7, 0.6)), "apart"),
        ("store-warm", run(passes=0, losses=(math.nan, 0.6)), "apart"),
    ],
)
def test_unequal_work_is_a_problem(method, wrong, problem):
    assert any(problem in line for line in benchmark.check({"adapter_off": [run()], method: [wrong]}))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_store_of_some_thousand_completions_is_measured():
    found = benchmark.measure_store(5000, 10, 1)
    assert (found["read"]["completions"], found["read"]["index_bytes"]) == (5000, 28 * 5000)
    assert found["fill"]["file_bytes"] > found["fill"]["value_bytes"] > 5000 * 4
    assert "5,000 completions" in benchmark.show_store(found)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_every_means_does_the_same_work_on_a_tiny_model(tmp_path, monkeypatch):
    tiny_model(vocab_size=320).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setitem(lengths.PROFILES, "hh", Profile(20, 5, 2))
    options = benchmark.parse(["--steps", "2", "--repeats", "1", "--threads", "1", "--model", str(tmp_path)])
    for kind in benchmark.METHODS:
        runs = benchmark.measure_steps(kind, options)
        assert tuple(runs) == benchmark.METHODS[kind]
        assert benchmark.check(runs) == []
        assert "store-warm" in benchmark.show_steps(kind, runs)
        assert len(benchmark.targets(runs)) == 1 + (kind == "lora")


def test_means_are_chosen_and_a_choice_of_none_is_refused(capsys):
    options = benchmark.parse(["--kinds", "lora", "--methods", "store-warm", "adapter_off"])
    assert benchmark.chosen("lora", options) == ["adapter_off", "store-warm"]
    assert benchmark.chosen("full", options) == ["store-warm"]
    with pytest.raises(SystemExit):
        benchmark.parse(["--methods", "adapter_off"])
    assert "none of those for full: snapshot, model, store-warm" in capsys.readouterr().err


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("checkpointing", "library"), [("on", "default"), ("off", "onednn")])
def test_what_a_run_is_told(checkpointing, library, tmp_path, monkeypatch):
    """The command line's options reach the trainer."""
    tiny_model(vocab_size=320).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setitem(lengths.PROFILES, "hh", Profile(20, 5, 2))
    monkeypatch.setattr(products, "_setting", {"library": "default"})
    told = []
    monkeypatch.setattr(benchmark, "_run", lambda spec: told.append(spec) or {"step_seconds": [1.0]})
    chosen = ["--kinds", "lora", "--methods", "adapter_off", "--repeats", "1", "--model", str(tmp_path)]
    further = ["--checkpointing", checkpointing, "--cpu-matmul", library]
    benchmark.measure_steps("lora", benchmark.parse([*chosen, *further]))
    args = reference_worker.make_trainer({**told[0], "threads": 1, "folder": str(tmp_path / "out")}, []).args
    assert (args.gradient_checkpointing, args.cpu_matmul) == (checkpointing == "on", library)


def test_without_a_full_store_there_are_no_targets():
    assert benchmark.targets({"snapshot": [run()], "model": [run()]}) == []
