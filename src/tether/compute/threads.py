"""How many threads a run on a CPU computes with: what the system grants, and of that what measurements find fastest.

A step consists of many short parallel regions, each of which ends when its last thread does. Threads that spin while
they wait take the cores from those that they wait for, as soon as other processes compute or a container's quota is
used up; see `tether._wait_briefly`, which ends that where Tether is imported before torch. Elsewhere fewer threads can
be many times as fast. What a user chose (`OMP_NUM_THREADS`, `torch.set_num_threads`) stays.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch import nn

import tether
from tether.compute.cgroups import groups, read
from tether.errors import ConfigError

logger = logging.getLogger("tether")
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Fewer threads must be this much faster to be taken: what a quiet machine's measurements differ by.
_WORTH = 1.1
# A burst spans several turns of a scheduler (3 to 4 ms each); their median forgets a single disturbance.
_BURST_SECONDS = 0.04
_ROUNDS = 7
# Threads that get less of their cores than this are measured again after so many seconds; each measurement that changes
# nothing doubles the time to the next, up to the longest.
_SHARE = 0.8
_FIRST_WAIT, _LONGEST_WAIT = 15.0, 480.0
_TOPOLOGY = Path("/sys/devices/system/cpu")
# What the last run of this process found, and what it was found among: the next one is free to decide again.
_own: dict[str, int] = {}


def choose_threads(setting: int | str | None, *, on_cpu: bool) -> int:
    """Set torch's threads for this process and say in one line how many and why.

    Args:
        setting: their number, `auto`, or None to leave them as torch has them.
        on_cpu: whether the run computes on a CPU; elsewhere nothing is measured.

    Returns:
        The number now in use.

    Raises:
        ConfigError: more threads than the system grants cores were asked for.
    """
    cores = granted_cores()
    if not on_cpu or setting is None:
        return torch.get_num_threads()
    if setting != "auto":
        if int(setting) > cores:
            raise ConfigError(f"is {setting}, and {cores} cores are granted to this process. Set auto.", "cpu_threads")
        threads, why = int(setting), "cpu_threads"
    elif chosen := chosen_elsewhere():
        threads, why = torch.get_num_threads(), chosen
    else:
        threads, why = _measured(cores)
        _own["threads"] = threads
    torch.set_num_threads(threads)
    logger.info(f"threads: {threads} of {cores} cores ({why})")
    return threads


class ThreadsAgain:
    """Chooses the threads anew while a run goes on, where other processes come or go; for threads chosen by `auto`."""

    def __init__(self) -> None:
        self._wait = _FIRST_WAIT
        self._begin()

    def look(self, step: int) -> None:
        """Measure again, if it is time and the cores were not all had, or not all used.

        Args:
            step: that was just made, for the line that says what changed.
        """
        passed, threads = time.monotonic() - self._since, torch.get_num_threads()
        if passed < self._wait or threads != _own.get("threads"):
            return
        cores = granted_cores()
        if threads == cores and time.process_time() - self._computed >= _SHARE * passed * threads:
            self._wait = _FIRST_WAIT
        else:
            found, why = _measured(cores)
            torch.set_num_threads(found)
            _own["threads"] = found
            self._wait = _FIRST_WAIT if found != threads else min(2 * self._wait, _LONGEST_WAIT)
            if found != threads:
                logger.info(f"threads: {found} of {cores} cores from step {step + 1} on ({why})")
        self._begin()

    def _begin(self) -> None:
        self._since, self._computed = time.monotonic(), time.process_time()


def chosen_elsewhere() -> str:
    """What says that the user, or a launcher, has set the threads; empty where they are as torch found them."""
    named = next((name for name in _VARIABLES if os.environ.get(name)), "")
    if named:
        return f"{named}={os.environ[named]}"
    now = torch.get_num_threads()
    if now in (_own.get("threads"), *_defaults()):
        return ""
    return f"torch.set_num_threads({now})"


def _defaults() -> tuple[int, int]:
    """What torch begins with: the cores that this process may use, or, by MKL, those that are not hyperthreads."""
    allowed = _affinity()
    siblings = {read(_TOPOLOGY / f"cpu{core}" / "topology" / "thread_siblings_list") or str(core) for core in allowed}
    return len(allowed), len(siblings)


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def granted_cores() -> int:
    """Cores that this process may use at once: by affinity, and by the CPU quota of its control groups."""
    quotas = [math.ceil(quota) for group in groups("cpu") for quota in _quota_of(group)]
    return max(1, min([len(_affinity()), *quotas]))


def _quota_of(folder: Path) -> Iterator[float]:
    """Cores that a control group is granted; nothing where it has no quota."""
    quota, period = (read(folder / "cpu.max").split() or ["max", ""])[:2]
    if quota == "max":
        quota, period = read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(quota) and int(period):  # -1: none
        yield int(quota) / int(period)


def _measured(cores: int) -> tuple[int, str]:
    """The fastest of all cores, half of them, and so on to one, and what was found."""
    counts = [cores >> halved for halved in range(cores.bit_length())]
    if len(counts) == 1:
        return 1, "no more are granted"
    rates = measured_rates(counts)
    # The most threads that are about as fast as any.
    threads = next(count for count in counts if rates[count] * _WORTH >= max(rates.values()))
    against = 1 if threads == cores else cores
    gain = rates[threads] / rates[against]
    said = f"measured {gain:.1f}x the speed of {against}; set cpu_threads or OMP_NUM_THREADS to choose"
    if threads < cores and not tether.WAITS_BRIEFLY:
        said += ", or GOMP_SPINCOUNT=30000 so that threads that wait leave their cores to others"
    return threads, said


def measured_rates(counts: list[int]) -> dict[int, float]:
    """Short parallel regions a second, as a training step has them, with each number of threads; medians, in turns."""
    rates: dict[int, list[float]] = {count: [] for count in counts}
    inputs, weight = torch.ones(256, 512), torch.ones(512, 512)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for burst in range(_ROUNDS + 1):
            for count in counts:
                torch.set_num_threads(count)
                done, start = 0, time.perf_counter()
                while (passed := time.perf_counter() - start) < _BURST_SECONDS:
                    nn.functional.silu(nn.functional.linear(inputs, weight)).mul_(0.5).softmax(-1)
                    done += 1
                if burst:  # the first finds its threads and its memory
                    rates[count].append(done / passed)
    return {count: median(found) for count, found in rates.items()}
