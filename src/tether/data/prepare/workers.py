"""Processes that prepare batches of rows, each with the job. Called by `prepare` and `stream`."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

from tether.data.prepare.job import Job

_WATCH_SECONDS = 2.0  # between two looks at whether the run still lives
_JOBS: list[Job] = []  # the job of a worker process; handing it over with every batch would copy all rows each time


def workers(job: Job, processes: int) -> ProcessPoolExecutor:
    """Processes that each hold the job, all of them running; functions that are submitted find it by `held_job`."""
    # Forked where the system can: a spawned process would import the user's script again, guard or not.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork beside threads; the workers use neither torch nor locks held by this process.
        warnings.simplefilter("ignore", DeprecationWarning)
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context(method), _hold_job, (job, os.getpid()))
        pool.submit(os.getpid).result()
    return pool


def held_job() -> Job:
    """The job of this worker process."""
    return _JOBS[0]


def _hold_job(job: Job, parent: int) -> None:
    _JOBS[:] = [job]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker waits for work as long as it lives; it must not outlive a run that was killed."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
