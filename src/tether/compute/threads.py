"""How many threads a run on a CPU computes with: what the system grants, and of that what measurements find fastest.

A step consists of many short parallel regions, each of which ends when its last thread does. Threads that spin while
they wait take the cores from those that they wait for, as soon as other processes compute or a container's quota is
used up. `tether._wait_briefly` shortens that where Tether is imported before torch, and `_Waits` ends it while others
compute; where neither helps, fewer threads can be many times as fast. What a user chose (`OMP_NUM_THREADS`,
`torch.set_num_threads`) stays.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from tether.compute.cgroups import groups, read
from tether.errors import ConfigError

logger = logging.getLogger("tether")
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Fewer threads must be this much faster to be taken: what a quiet machine's measurements differ by. On a busy one they
# differ by more, and what a run goes on with stays unless another choice is faster than that.
_WORTH, _WORTH_A_CHANGE = 1.1, 1.3
# All cores that get less of themselves than this share them, with other processes or by a quota.
_ALONE = 0.9
# Threads that get less of their cores than this are measured again after so many seconds; each measurement that changes
# nothing doubles the time to the next, up to the longest.
_SHARE = 0.8
_FIRST_WAIT, _LONGEST_WAIT = 15.0, 480.0
_TOPOLOGY = Path("/sys/devices/system/cpu")


class Choice(NamedTuple):
    """How many threads compute, and whether those that wait for others sleep at once in place of spinning."""

    threads: int
    sleeping: bool = False


class Bursts(NamedTuple):
    """How choices are measured: so often each, for so many seconds, and once before, to find threads and memory."""

    tokens: int  # of a region's product
    width: int  # of it
    seconds: float
    rounds: int


# A burst spans several turns of a scheduler (3 to 4 ms each); their median forgets a single disturbance. Where other
# processes compute, a scheduler moves threads between cores several times a second, and that is part of the answer.
# Their products take about a millisecond on one core, and about twenty.
_SHORT, _LONG = Bursts(256, 512, 0.04, 7), Bursts(1024, 1408, 0.3, 5)


class Measured(NamedTuple):
    """What a choice was measured to do."""

    rate: float  # regions a second
    share: float  # of its threads' cores that it had, from 0 to 1


class _Waits:
    """How threads wait for each other: as GNU's OpenMP was told, or sleeping at once.

    It sleeps at once where it has more threads than there are cores, and each thread of Python that computes has a pool
    of its own: one that holds such a pool, and does nothing, makes the others sleep. With another OpenMP nothing
    changes, as a measurement then finds.
    """

    def __init__(self) -> None:
        self._end: threading.Event | None = None
        self._holder = threading.Thread()

    def sleep(self, at_once: bool, threads: int) -> None:
        """Let threads that wait, of so many, sleep at once, or no more."""
        if at_once and self._end is None:
            ready, self._end = threading.Event(), threading.Event()
            self._holder = threading.Thread(target=self._hold, args=(threads, ready, self._end), daemon=True)
            self._holder.start()
            ready.wait()
        elif self._end is not None and not at_once:
            self._end.set()
            self._holder.join()
            self._end = None

    @staticmethod
    def _hold(threads: int, ready: threading.Event, end: threading.Event) -> None:
        # As few as make, with the run's own, one more than there are cores; this thread itself does not count.
        torch.set_num_threads(max(len(_affinity()) - threads, 0) + 2)
        torch.zeros(2**20).add_(1.0)  # a parallel region, for which the pool is made; it ends with this thread
        ready.set()
        end.wait()


# What the last run of this process chose: the next one is free to decide again.
_own: Choice | None = None
_waits = _Waits()


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
        return _choose(cores, "")
    _take(Choice(threads))
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
        passed, before = time.monotonic() - self._since, _own
        if passed < self._wait or before is None or torch.get_num_threads() != before.threads:
            return
        cores = granted_cores()
        had = time.process_time() - self._computed >= _SHARE * passed * before.threads
        if had and before == Choice(cores):
            self._wait = _FIRST_WAIT
        else:
            _choose(cores, f" from step {step + 1} on", had=had)
            self._wait = min(2 * self._wait, _LONGEST_WAIT) if _own == before else _FIRST_WAIT
        self._begin()

    def _begin(self) -> None:
        self._since, self._computed = time.monotonic(), time.process_time()


def chosen_elsewhere() -> str:
    """What says that the user, or a launcher, has set the threads; empty where they are as torch found them."""
    named = next((name for name in _VARIABLES if os.environ.get(name)), "")
    if named:
        return f"{named}={os.environ[named]}"
    now = torch.get_num_threads()
    if now in (_own and _own.threads, *_defaults()):
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


def _choose(cores: int, since: str, *, had: bool = False) -> int:
    """Take what is found fastest, and say so where that is another choice than before; the number of threads."""
    global _own
    before, (_own, why) = _own, _measured(cores, _own if since else None, had=had)
    _take(_own)
    if not since or _own != before:
        logger.info(f"threads: {_own.threads} of {cores} cores{since} ({why})")
    return _own.threads


def _take(choice: Choice) -> None:
    _waits.sleep(choice.sleeping, choice.threads)
    torch.set_num_threads(choice.threads)  # last: the pool that lets others sleep sets a number of its own


def _measured(cores: int, now: Choice | None = None, *, had: bool = False) -> tuple[Choice, str]:
    """What to compute with, and why: all cores, these with threads that sleep, half of them, and so on to one.

    Short regions tell how many threads pay off, and whether they may spin: not where others need the cores. Whether all
    that sleep are better there than fewer is told by long regions, which take most of a step: in short ones all that
    further threads gain goes into waiting.

    Args:
        cores: that are granted.
        now: what a run computes with, which goes on unless another is faster by a good deal.
        had: whether its threads had their cores.
    """
    fewer = [Choice(cores >> halved) for halved in range(1, cores.bit_length())]
    if not fewer:
        return Choice(1), "no more are granted"
    every, sleeping = Choice(cores), Choice(cores, sleeping=True)
    found = measured([every, sleeping, *fewer], _SHORT)
    rates = {choice: one.rate for choice, one in found.items()}
    best = _most([every, *fewer], rates)
    if found[every].share >= _ALONE and rates[sleeping] <= _WORTH * rates[best]:
        best = now if now is not None and rates.get(now, 0.0) * _WORTH_A_CHANGE >= rates[best] else best
        against = Choice(1) if best == every else every
        why = f"measured {rates[best] / rates[against]:.1f}x the speed of {against.threads}"
    elif now is not None and (now == sleeping or (had and now in fewer)):
        best, why = now, "as before"  # as long regions told then, which take seconds
    else:
        best, why = _better(_most(fewer, rates), sleeping)
    return best, f"{why}; set cpu_threads or OMP_NUM_THREADS to choose"


def _most(choices: list[Choice], rates: dict[Choice, float]) -> Choice:
    """The first, with the most threads, that is about as fast as any."""
    return next(one for one in choices if rates[one] * _WORTH >= max(rates[other] for other in choices))


def _better(few: Choice, sleeping: Choice) -> tuple[Choice, str]:
    """The faster of both in long regions; and what was found."""
    found = measured([few, sleeping], _LONG)
    best = sleeping if found[sleeping].rate > _WORTH * found[few].rate else few
    rates = ", ".join(f"{one.rate:.0f} by {_name(choice)}" for choice, one in found.items())
    return best, f"its cores are not free all the time; long regions a second: {rates}"


def _name(choice: Choice) -> str:
    return f"{choice.threads}{' that sleep while they wait' if choice.sleeping else ''}"


def measured(choices: list[Choice], bursts: Bursts) -> dict[Choice, Measured]:
    """Regions a second by each choice, and the share of its cores that it had; medians, in turns.

    A region is a product, and what follows it element by element, as a training step has them.
    """
    inputs, weight = torch.ones(bursts.tokens, 512), torch.ones(bursts.width, 512)
    found: dict[Choice, list[Measured]] = {choice: [] for choice in choices}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for burst in range(bursts.rounds + 1):
            for choice in choices:
                _take(choice)
                done, computed, start = 0, time.process_time(), time.perf_counter()
                while (passed := time.perf_counter() - start) < bursts.seconds:
                    nn.functional.silu(nn.functional.linear(inputs, weight)).mul_(0.5).softmax(-1)
                    done += 1
                if burst:
                    share = (time.process_time() - computed) / (passed * choice.threads)
                    found[choice].append(Measured(done / passed, share))
    return {choice: Measured(*(median(values) for values in zip(*ones, strict=True))) for choice, ones in found.items()}
