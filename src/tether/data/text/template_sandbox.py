"""Chat templates that must end: they are programs of others, and a loop in a loop takes years. Called by whatever
applies one."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tether.errors import DataError

# For one call, which writes at most a batch of rows; real templates take under a second for these.
ENDS_WITHIN = 60.0


class EndlessTemplateError(DataError):
    """A chat template that did not end in time."""

    def __init__(self) -> None:
        super().__init__(
            f"The chat template did not end within {ENDS_WITHIN:g} s. It loops over more than a conversation has; "
            "correct it, or set another one (`model.chat_template`)."
        )


class _Watch:
    """One thread that ends what is over its time, for as long as there is something to watch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[object, tuple[int, float]] = {}
        self._thread: threading.Thread | None = None

    def begin(self) -> object:
        """Watch what this thread does from now on."""
        with self._lock:
            self._watched[key := object()] = threading.get_ident(), time.monotonic() + ENDS_WITHIN
            if self._thread is None or not self._thread.is_alive():  # it does not live on in a process that was forked
                self._thread = threading.Thread(target=self._look, daemon=True)
                self._thread.start()
        return key

    def end(self, key: object) -> None:
        """Watch it no more; if it was ended and has not seen that yet, it ended by itself at the same moment."""
        with self._lock:
            if self._watched.pop(key, None) is None:
                _raise_in(threading.get_ident(), None)

    def _look(self) -> None:
        while True:
            time.sleep(ENDS_WITHIN / 20)
            with self._lock:
                if not self._watched:
                    self._thread = None
                    return
                now = time.monotonic()
                for key in [key for key, (_, last) in self._watched.items() if now > last]:
                    _raise_in(self._watched.pop(key)[0], EndlessTemplateError)


_WATCH = _Watch()
if hasattr(os, "register_at_fork"):  # the lock may be held at that moment, by a thread that the child has not
    os.register_at_fork(after_in_child=_WATCH.__init__)


@contextmanager
def ending_template() -> Iterator[None]:
    """End what runs inside when it takes longer than `ENDS_WITHIN`, on whatever thread.

    Raises:
        EndlessTemplateError: it did. One step of it, such as the making of one text, is not interrupted.
    """
    key = _WATCH.begin()
    try:
        yield
    finally:
        _WATCH.end(key)


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Raise an error in a thread at its next step; None takes one back that it has not come to."""
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
