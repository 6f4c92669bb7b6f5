"""Processes that prepare or look at batches of rows, each with the job. Called by `prepare`, `stream` and `audit`."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")

_WATCH_SECONDS = 2.0  # between two looks at whether the run still lives
_JOBS: list[Any] = []  # the job of a worker process; handing it over with every batch would copy all rows each time


def workers(job: Any, processes: int) -> ProcessPoolExecutor:
    """Processes that each hold the job, all of them running; functions that are submitted find it by `held_job`."""
    # Forked where the system can: a spawned process would import the user's script again, guard or not.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork beside threads; the workers use neither torch nor locks held by this process.
        warnings.simplefilter("ignore", DeprecationWarning)
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context(method), _hold_job, (job, os.getpid()))
        pool.submit(os.getpid).result()
    return pool


def in_order(
    pool: ProcessPoolExecutor, function: Callable[[Item], Found], items: Iterable[Item], ahead: int
) -> Iterator[Found]:
    """What a function gives for each item, in their order, with at most so many made ahead of who takes them."""
    left, waiting = iter(items), deque[Future[Found]]()
    waiting.extend(pool.submit(function, item) for item in islice(left, ahead))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(function, item) for item in islice(left, 1))


def held_job() -> Any:
    """The job of this worker process."""
    return _JOBS[0]


def _hold_job(job: Any, parent: int) -> None:
    _JOBS[:] = [job]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker waits for work as long as it lives; it must not outlive a run that was killed."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
