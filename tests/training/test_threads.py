"""Threads of a run on a CPU: affinity, quotas of control groups, what a user chose, and a measurement in turns."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tether
from tether.compute import threads
from tether.errors import ConfigError


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of eight cores without hyperthreads, no control group and no choice of a user."""
    now = {"threads": 8}
    for name in threads._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_own", {})
    monkeypatch.setattr(tether, "WAITS_BRIEFLY", True)
    monkeypatch.setattr(threads, "_affinity", lambda: set(range(8)))
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path / "topology")
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroups")
    monkeypatch.setattr(threads, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(torch, "get_num_threads", lambda: now["threads"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: now.update(threads=count))
    return now


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/box\n", {"box/cpu.max": "200000 100000", "cpu.max": "max 100000"}, 2),
        ("0::/box/inner\n", {"box/cpu.max": "350000 100000", "box/inner/cpu.max": "max 100000"}, 4),
        ("0::/of/the/host\n", {"cpu.max": "50000 100000"}, 1),
        (
            "3:cpu,cpuacct:/box\n",
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "300000", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("0::/\n", {"cpu.max": "1600000 100000"}, 8),
        ("4:memory:/\n", {"memory/cpu.cfs_quota_us": "100000", "memory/cpu.cfs_period_us": "100000"}, 8),
    ],
    ids=["v2", "a parent", "inside a container", "v1", "no quota", "above affinity", "another controller"],
)
def test_a_quota_below_the_cores_counts(machine, tmp_path, membership, files, cores):
    write(tmp_path / "membership", membership)
    for name, text in files.items():
        write(tmp_path / "cgroups" / name, text + "\n")
    assert threads.granted_cores() == cores


@pytest.mark.parametrize(
    ("rates", "taken", "words"),
    [
        ({8: 10, 4: 7, 2: 4, 1: 2}, 8, "measured 5.0x the speed of 1"),
        ({8: 10, 4: 10.5, 2: 4, 1: 2}, 8, "measured 5.0x the speed of 1"),
        ({8: 1, 4: 2, 2: 6, 1: 5}, 2, "measured 6.0x the speed of 8"),
        ({8: 1, 4: 2, 2: 3, 1: 4}, 1, "measured 4.0x the speed of 8"),
    ],
)
def test_fewer_threads_are_taken_where_they_are_faster(machine, monkeypatch, caplog, rates, taken, words):
    """A tenth is what a quiet machine differs by, so that it keeps all its threads."""
    caplog.set_level(logging.INFO, logger="tether")
    monkeypatch.setattr(threads, "measured_rates", lambda counts: {count: rates[count] for count in counts})
    assert threads.choose_threads("auto", on_cpu=True) == machine["threads"] == taken
    assert f"threads: {taken} of 8 cores ({words}; set cpu_threads or OMP_NUM_THREADS to choose)" in caplog.text
    # The next run of the process is free to decide again.
    monkeypatch.setattr(threads, "measured_rates", lambda counts: dict.fromkeys(counts, 1.0))
    assert threads.choose_threads("auto", on_cpu=True) == 8


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have passed, and seconds that this process has computed."""
    now = {"passed": 0.0, "computed": 0.0}
    told = {"monotonic": lambda: now["passed"], "process_time": lambda: now["computed"]}
    monkeypatch.setattr(threads, "time", SimpleNamespace(**told))
    return now


def test_threads_are_chosen_again_where_other_processes_come_and_go(machine, clock, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="tether")
    rates, measured = dict.fromkeys((8, 4, 2, 1), 1.0), []
    monkeypatch.setattr(threads, "measured_rates", lambda counts: measured.append(clock["passed"]) or rates)
    threads.choose_threads("auto", on_cpu=True)
    again = threads.ThreadsAgain()

    def steps(seconds: int, cores: float) -> int:
        measured.clear()
        for _ in range(seconds):
            clock["passed"] += 1
            clock["computed"] += cores
            again.look(int(clock["passed"]))
        return len(measured)

    assert steps(1000, 8.0) == 0  # it has all its cores
    rates.update({8: 1, 4: 2, 2: 6, 1: 3})
    assert steps(15, 3.0) == 1  # others compute too
    assert machine["threads"] == 2
    assert "threads: 2 of 8 cores from step 1006 on (measured 6.0x the speed of 8" in caplog.text
    # Nothing changes: after 15, 30, 60, 120, 240, 480 seconds, and so on.
    assert steps(15 + 30 + 60 + 120 + 240 + 480 + 480, 2.0) == 7
    rates.update(dict.fromkeys(rates, 1.0))
    assert steps(480, 2.0) == 1
    assert machine["threads"] == 8
    steps(15, 8.0)  # the rest of a time in which it had two
    assert steps(1000, 8.0) == 0


def test_threads_that_a_user_sets_in_a_run_stay(machine, clock, monkeypatch):
    monkeypatch.setattr(threads, "measured_rates", lambda counts: dict.fromkeys(counts, 1.0))
    threads.choose_threads("auto", on_cpu=True)
    again = threads.ThreadsAgain()
    torch.set_num_threads(3)
    clock["passed"] = 1000.0
    again.look(1)
    assert machine["threads"] == 3


def test_threads_that_spin_are_said_where_they_cost(machine, monkeypatch, caplog):
    """Torch was imported before Tether, so that only the number of threads can be chosen."""
    caplog.set_level(logging.INFO, logger="tether")
    for briefly, rates in (
        (False, {8: 1, 4: 1, 2: 1, 1: 4}),
        (True, {8: 1, 4: 1, 2: 1, 1: 4}),
        (False, {8: 9, 4: 4, 2: 2, 1: 1}),
    ):
        monkeypatch.setattr(tether, "WAITS_BRIEFLY", briefly)
        monkeypatch.setattr(threads, "measured_rates", lambda counts, rates=rates: rates)
        threads.choose_threads("auto", on_cpu=True)
    assert ["GOMP_SPINCOUNT=30000" in line for line in caplog.messages] == [True, False, False]


def test_threads_that_wait_sleep_soon_where_tether_comes_first():
    """Torch reads the environment when it is loaded; what a user said of how to wait stays."""
    environment: dict[str, str] = {}
    assert not tether._wait_briefly(environment, {"torch"})
    assert environment == {}
    assert tether._wait_briefly(environment, {"numpy"})
    assert environment == {"GOMP_SPINCOUNT": "30000"}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        assert tether._wait_briefly({name: "active"}, set())
    spoken = {"OMP_WAIT_POLICY": "active"}
    assert tether._wait_briefly(spoken, set())
    assert spoken == {"OMP_WAIT_POLICY": "active"}


def test_what_a_user_chose_stays(machine, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="tether")
    monkeypatch.setattr(threads, "measured_rates", lambda counts: pytest.fail("measured all the same"))
    assert threads.choose_threads("auto", on_cpu=False) == 8
    assert threads.choose_threads(3, on_cpu=True) == machine["threads"] == 3
    assert threads.choose_threads("auto", on_cpu=True) == 3
    assert "threads: 3 of 8 cores (torch.set_num_threads(3))" in caplog.text
    machine["threads"] = 8
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert threads.choose_threads("auto", on_cpu=True) == 8
    assert "threads: 8 of 8 cores (OMP_NUM_THREADS=8)" in caplog.text
    with pytest.raises(ConfigError, match="cpu_threads is 9, and 8 cores are granted"):
        threads.choose_threads(9, on_cpu=True)


def test_threads_that_are_hyperthreads_are_torchs_own_choice(machine, monkeypatch, tmp_path):
    """Torch with MKL begins with one thread a core, which is no choice of the user's."""
    for core in range(8):
        write(
            tmp_path / "topology" / f"cpu{core}" / "topology" / "thread_siblings_list", f"{core % 4},{core % 4 + 4}\n"
        )
    monkeypatch.setattr(threads, "measured_rates", lambda counts: dict.fromkeys(counts, 1.0))
    machine["threads"] = 4
    assert threads.chosen_elsewhere() == ""
    machine["threads"] = 6
    assert threads.chosen_elsewhere() == "torch.set_num_threads(6)"


def test_each_count_is_measured_in_turns(monkeypatch):
    monkeypatch.setattr(threads, "_BURST_SECONDS", 0.001)
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    rates = threads.measured_rates([2, 1])
    assert used == [2, 1] * (threads._ROUNDS + 1)
    assert rates.keys() == {2, 1}
    assert min(rates.values()) > 0
