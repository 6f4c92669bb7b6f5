"""What an iterator gives, made ahead by a thread of its own. Called by `stream`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Full, Queue
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")
_SECONDS = 0.1
_JOIN_SECONDS = 10.0


class Ahead(Generic[Item]):
    """An iterator whose next items are made while the one that came last is in use.

    At most `count` items wait; the thread then makes one more and pauses. What it raises is raised here, in its place.

    Args:
        make: gives the iterator; it is called in the thread.
        count: items that may wait.

    Example:
        >>> with Ahead(lambda: iter("abc"), 1) as letters:
        ...     list(letters)
        ['a', 'b', 'c']
    """

    def __init__(self, make: Callable[[], Iterator[Item]], count: int) -> None:
        self._make = make
        self._queue: Queue[tuple[Item | None, BaseException | None]] = Queue(count)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tether-prepares-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        items: Iterator[Item] | None = None
        try:
            items = self._make()
            for item in items:
                if not self._put(item, None):
                    return
            self._put(None, StopIteration())
        except BaseException as error:  # it is the other thread that must hear of it
            self._put(None, error)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    def _put(self, item: Item | None, error: BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put((item, error), timeout=_SECONDS)
                return True
            except Full:
                continue
        return False

    def __iter__(self) -> Ahead[Item]:
        return self

    def __next__(self) -> Item:
        if self._stop.is_set():
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self._stop.set()
            raise error
        return cast(Item, item)

    def close(self) -> None:
        """Stop making items; those that wait are lost."""
        self._stop.set()
        self._thread.join(_JOIN_SECONDS)

    def __enter__(self) -> Ahead[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
