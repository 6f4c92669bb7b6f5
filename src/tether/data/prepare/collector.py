"""Python's search for cycles, paused where very many lists are made and none is in a cycle. Called by `prepare`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Look for no cycles until this is left; as a decorator, while a function runs.

    Every few hundred new lists start a search, and it visits all that live, ids of words included: a quarter of
    the time that preparation takes. Pause for a batch at a time, so that what templates leave behind does not add up.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
