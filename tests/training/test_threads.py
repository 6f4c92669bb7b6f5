"""Threads of a run on a CPU: affinity, quotas of control groups, what a user chose, and a measurement in turns."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tether
from tether.compute import cgroups, memory, threads
from tether.errors import ConfigError


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of eight cores without hyperthreads, no control group and no choice of a user."""
    now = {"threads": 8}
    for name in threads._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_own", None)
    monkeypatch.setattr(threads, "_waits", SimpleNamespace(sleep=lambda at_once, _: now.update(sleeping=at_once)))
    monkeypatch.setattr(threads, "_affinity", lambda: set(range(8)))
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path / "topology")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "cgroups")
    monkeypatch.setattr(cgroups, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(torch, "get_num_threads", lambda: now["threads"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: now.update(threads=count))
    return now


SLEEPING = threads.Choice(8, sleeping=True)


def measures(monkeypatch, *, share=1.0, **rates: dict) -> list[str]:
    """Measurements find these rates, by threads, in `short` regions and in `long` ones; which were made."""
    made = []

    def measured(choices, bursts):
        kind = "short" if bursts == threads._SHORT else "long"
        made.append(kind)
        found = {one: rates[kind][SLEEPING if one.sleeping else one.threads] for one in choices}
        return {one: threads.Measured(rate, share) for one, rate in found.items()}

    monkeypatch.setattr(threads, "measured", measured)
    return made


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
    ("membership", "files", "limit"),
    [
        ("0::/slice/job\n", {"slice/memory.max": "3000", "slice/job/memory.max": "max"}, 3000),
        ("0::/of/the/host\n", {"memory.max": "2000"}, 2000),
        ("9:memory:/job\n", {"memory/job/memory.limit_in_bytes": "1000", "memory/memory.limit_in_bytes": "5000"}, 1000),
        ("0::/other\n", {"slice/memory.max": "3000"}, None),
    ],
    ids=["a parent", "inside a container", "v1", "another group"],
)
def test_a_limit_of_memory_below_the_machine_counts(machine, tmp_path, membership, files, limit):
    whole = memory.machine_bytes()
    write(tmp_path / "membership", membership)
    for name, text in files.items():
        write(tmp_path / "cgroups" / name, text + "\n")
    assert memory.machine_bytes() == (limit or whole)


@pytest.mark.parametrize(
    ("short", "share", "long", "taken", "words"),
    [
        ({8: 10, 4: 7, 2: 4, 1: 2, SLEEPING: 5}, 1, {}, (8, False), "measured 5.0x the speed of 1"),
        ({8: 10, 4: 10.5, 2: 4, 1: 2, SLEEPING: 5}, 1, {}, (8, False), "measured 5.0x the speed of 1"),
        # Fewer pay off, and nobody else needs the cores.
        ({8: 1, 4: 2, 2: 6, 1: 5, SLEEPING: 2}, 1, {}, (2, False), "measured 6.0x the speed of 8"),
        ({8: 1, 4: 2, 2: 3, 1: 4, SLEEPING: 4}, 1, {}, (1, False), "measured 4.0x the speed of 8"),
        ({8: 2, 4: 3, 2: 4, 1: 4.2, SLEEPING: 5}, 1, {2: 20, SLEEPING: 30}, SLEEPING, "20 by 2, 30 by 8 that sleep"),
        ({8: 2, 4: 3, 2: 4, 1: 4.2, SLEEPING: 5}, 1, {2: 20, SLEEPING: 21}, (2, False), "20 by 2, 21 by 8 that sleep"),
        ({8: 1, 4: 2, 2: 6, 1: 5, SLEEPING: 2}, 0.5, {2: 20, SLEEPING: 15}, (2, False), "20 by 2, 15 by 8 that sleep"),
        ({8: 1, 4: 2, 2: 3, 1: 4, SLEEPING: 1}, 0.5, {1: 9, SLEEPING: 20}, SLEEPING, "9 by 1, 20 by 8 that sleep"),
        # Fastest for the moment, on cores that others use as well: threads may not spin there.
        ({8: 9, 4: 7, 2: 4, 1: 2, SLEEPING: 5}, 0.8, {4: 20, SLEEPING: 30}, SLEEPING, "20 by 4, 30 by 8 that sleep"),
    ],
)
def test_what_is_fastest_is_taken(machine, monkeypatch, caplog, short, share, long, taken, words):
    """A tenth is what a quiet machine differs by, so that it keeps all its threads, and how they wait. Where its cores
    are not its own, long regions tell whether all that sleep are faster than fewer."""
    caplog.set_level(logging.INFO, logger="tether")
    made = measures(monkeypatch, short=short, long=long, share=share)
    assert threads.choose_threads("auto", on_cpu=True) == machine["threads"] == taken[0]
    assert machine["sleeping"] == taken[1]
    busy = "its cores are not free all the time; long regions a second: " if long else ""
    waits = " while they wait" if long else ""
    assert f"threads: {taken[0]} of 8 cores ({busy}{words}{waits}; set cpu_threads or" in caplog.text
    assert made == ["short", "long"][: 1 + bool(long)]
    # The next run of the process is free to decide again.
    measures(monkeypatch, short=dict.fromkeys((8, 4, 2, 1, SLEEPING), 1.0))
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
    short, long = dict.fromkeys((8, 4, 2, 1, SLEEPING), 1.0), dict.fromkeys((4, 2, 1, SLEEPING), 1.0)
    made = measures(monkeypatch, short=short, long=long)
    threads.choose_threads("auto", on_cpu=True)
    again = threads.ThreadsAgain()

    def steps(seconds: int, cores: float) -> int:
        made.clear()
        for _ in range(seconds):
            clock["passed"] += 1
            clock["computed"] += cores
            again.look(int(clock["passed"]))
        return made.count("short")

    assert steps(1000, 8.0) == 0  # it has all its cores
    short.update({8: 1, 4: 2, 2: 5, 1: 3, SLEEPING: 6})
    long.update({2: 1, SLEEPING: 1.2})
    assert steps(15, 3.0) == 1  # others compute too
    assert (machine["threads"], machine["sleeping"]) == (8, True)
    assert "threads: 8 of 8 cores from step 1006 on (its cores are not free all the time" in caplog.text
    long.update({2: 9})
    assert steps(15, 3.0) == 1  # whether the machine is quiet again is not seen from what is had
    assert "long" not in made  # and long regions take seconds: what sleeps goes on
    assert (machine["threads"], machine["sleeping"]) == (8, True)
    short.update({8: 9, 4: 2, 2: 5, 1: 3, SLEEPING: 6})
    assert steps(30, 8.0) == 1
    assert (machine["threads"], machine["sleeping"]) == (8, False)
    assert "threads: 8 of 8 cores from step 1051 on (measured 3.0x the speed of 1" in caplog.text
    short.update({8: 1})
    long.update({2: 9, SLEEPING: 1})
    assert steps(15, 3.0) == 1
    assert (machine["threads"], machine["sleeping"]) == (2, False)
    # Nothing changes: after 15, 30, 60, 120, 240, 480 seconds, and so on.
    long.update({SLEEPING: 20})
    assert steps(15 + 30 + 60 + 120 + 240 + 480 + 480, 2.0) == 7
    assert "long" not in made  # its threads have their cores
    assert machine["threads"] == 2
    short.update(dict.fromkeys(short, 1.0))
    assert steps(480, 2.0) == 1
    assert machine["threads"] == 2  # what differs by less than measurements do is not changed in a run
    short.update({8: 1.4})
    assert steps(480, 2.0) == 1
    assert (machine["threads"], machine["sleeping"]) == (8, False)
    steps(15, 8.0)  # the rest of a time in which it had two
    assert steps(1000, 8.0) == 0


def test_threads_that_a_user_sets_in_a_run_stay(machine, clock, monkeypatch):
    measures(monkeypatch, short=dict.fromkeys((8, 4, 2, 1, SLEEPING), 1.0))
    threads.choose_threads("auto", on_cpu=True)
    again = threads.ThreadsAgain()
    torch.set_num_threads(3)
    clock["passed"] = 1000.0
    again.look(1)
    assert machine["threads"] == 3


def test_threads_sleep_at_once_while_another_thread_holds_a_pool():
    """Whether that is faster is measured; here, that the pool is there, as libgomp counts it, and goes again."""
    script = """
import torch
from tether.compute import cgroups, memory, threads
cores = len(threads._affinity())
def count():
    return int(next(line for line in open("/proc/self/status") if line.startswith("Threads:")).split()[1])
torch.set_num_threads(2)
torch.zeros(2**20).add_(1.0)
before = count()
threads._take(threads.Choice(2, sleeping=True))
threads._take(threads.Choice(2, sleeping=True))
during, now = count(), torch.get_num_threads()
threads._take(threads.Choice(2))
for _ in range(100):  # threads of a pool that is given up end by themselves
    if count() == before:
        break
    threads.time.sleep(0.1)
print(during - before - max(cores, 2), now, count() - before)
"""
    if sys.platform != "linux":
        pytest.skip("GNU's OpenMP")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.split() == ["0", "2", "0"]


def test_threads_that_wait_sleep_soon_where_tether_comes_first():
    """Torch reads the environment when it is loaded; what a user said of how to wait stays."""
    environment: dict[str, str] = {}
    tether._wait_briefly(environment, {"torch"})
    assert environment == {}
    tether._wait_briefly(environment, {"numpy"})
    assert environment == {"GOMP_SPINCOUNT": "30000"}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        spoken = {name: "active"}
        tether._wait_briefly(spoken, set())
        assert spoken == {name: "active"}


def test_what_a_user_chose_stays(machine, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="tether")
    monkeypatch.setattr(threads, "measured", lambda *_: pytest.fail("measured all the same"))
    assert threads.choose_threads("auto", on_cpu=False) == 8
    machine["sleeping"] = True  # as a run before it left them
    assert threads.choose_threads(3, on_cpu=True) == machine["threads"] == 3
    assert not machine["sleeping"]
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
    measures(monkeypatch, short=dict.fromkeys((8, 4, 2, 1, SLEEPING), 1.0))
    machine["threads"] = 4
    assert threads.chosen_elsewhere() == ""
    machine["threads"] = 6
    assert threads.chosen_elsewhere() == "torch.set_num_threads(6)"


@pytest.mark.parametrize("bursts", [threads._SHORT, threads._LONG])
def test_each_choice_is_measured_in_turns(machine, monkeypatch, bursts):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: used.append((count, machine["sleeping"])))
    choices = [threads.Choice(2), SLEEPING, threads.Choice(1)]
    found = threads.measured(choices, bursts._replace(seconds=0.001, rounds=3))
    assert used == [(2, False), (8, True), (1, False)] * 4
    assert [*found] == choices
    # The threads are not really set here: one computes, so that of eight an eighth is had.
    assert all(one.rate > 0 and 0 < one.share <= 1.1 / choice.threads for choice, one in found.items())
