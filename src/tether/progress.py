"""Waiting made visible: a live line on a terminal, one display in a notebook, plain lines in a log file.

One thing is shown at a time; what begins while another is shown says nothing. Everything goes to `console()`, standard
error, so that what a command answers on standard output stays clean.
"""

from __future__ import annotations

import contextlib
import functools
import html
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

logger = logging.getLogger("tether")
T = TypeVar("T")
# What takes less is not shown; between two plain lines, and between two changes of a notebook's display.
_PATIENCE = 2.0
_PLAIN_SECONDS = 10.0
_NOTEBOOK_SECONDS = 0.25
_BUSY = threading.Lock()
_FLICKER = 0.3  # a live line that is gone at once only disturbs


@functools.cache
def console() -> Console:
    """The one console on standard error; lines printed to it appear above a live display."""
    return Console(stderr=True, highlight=False)


class Shown(Protocol):
    """A display that is changed in place."""

    def update(self, text: str, done: float = 0.0, total: float | None = None) -> None:
        """Show a text, and how much is done of a total."""

    def close(self) -> None:
        """Take away what does not stay; harmless when nothing is shown."""


class Board:
    """One display of a notebook: a bar with a text, and under it the lines that stay. No control characters."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._bar, self._drawn = "", 0.0
        self._handle: Any = None

    def update(self, text: str, done: float = 0.0, total: float | None = None) -> None:
        """See `Shown`; changes that follow each other closely are left out."""
        share = f'value="{done:g}" max="{total:g}"' if total else ""
        self._bar = f"<progress {share}></progress> {html.escape(text)}"
        if time.monotonic() - self._drawn > _NOTEBOOK_SECONDS:
            self._draw()

    def keep(self, line: str) -> None:
        """Show a line that stays."""
        self._lines.append(html.escape(line))
        self._draw()

    def close(self) -> None:
        """See `Shown`."""
        self._bar = ""
        if self._handle is not None:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import HTML, display

        self._drawn = time.monotonic()
        lines = "\n".join(part for part in (*self._lines, self._bar) if part)
        page = HTML(f'<div style="font-family:monospace;white-space:pre-wrap">{lines}</div>')
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)


class _Late(ABC):
    """What begins to be shown when something has taken a while."""

    def __init__(self, seconds: float) -> None:
        self._lock, self._over = threading.Lock(), False
        self._timer = threading.Timer(seconds, self._in_time)
        self._timer.daemon = True
        self._timer.start()

    def _in_time(self) -> None:
        with self._lock:
            if not self._over:
                self._begin()

    @abstractmethod
    def _begin(self) -> None:
        """Show it from now on."""

    def close(self) -> None:
        """See `Shown`."""
        self._timer.cancel()
        with self._lock:
            self._over = True


class _Line(_Late):
    """A live line on a terminal, gone when it is closed."""

    def __init__(self, text: str, total: float | None) -> None:
        bar = () if total is None else (BarColumn(bar_width=20), MofNCompleteColumn())
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), *bar, TimeElapsedColumn())
        self._progress = Progress(*columns, console=console(), transient=True)
        self._task = self._progress.add_task(text, total=total)
        super().__init__(_FLICKER)

    def _begin(self) -> None:
        self._progress.start()

    def update(self, text: str, done: float = 0.0, total: float | None = None) -> None:
        """See `Shown`."""
        self._progress.update(self._task, description=text, completed=done, total=total)

    def close(self) -> None:
        """See `Shown`."""
        super().close()
        self._progress.stop()


class _Plain(_Late):
    """Lines of a log: the first when it has taken a while, then one every ten seconds where something was done."""

    def __init__(self, text: str, unit: str) -> None:
        self._unit, self._text, self._said = unit, text, time.monotonic()
        super().__init__(_PATIENCE)

    def _begin(self) -> None:
        logger.info(f"{self._text} …")

    def update(self, text: str, done: float = 0.0, total: float | None = None) -> None:
        """See `Shown`."""
        self._text = text
        if done and time.monotonic() - self._said > _PLAIN_SECONDS:
            self._said = time.monotonic()
            logger.info(f"{text}: {done:,.0f}{'' if total is None else f' of {total:,.0f}'} {self._unit}")


class Lines(logging.Handler):
    """Messages above a live line, or in the display of a notebook's cell."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one."""
        if in_notebook():
            board_of_cell().keep(self.format(record))
        else:
            console().print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def in_notebook() -> bool:
    """Whether what is displayed goes to a notebook."""
    return console().is_jupyter


def board_of_cell() -> Board:
    """The one display of the notebook's cell that runs now."""
    from IPython.core.getipython import get_ipython

    return _board(getattr(get_ipython(), "execution_count", 0))


@functools.lru_cache(maxsize=1)
def _board(cell: int) -> Board:
    return Board()


@contextlib.contextmanager
def alone() -> Iterator[bool]:
    """Inside, nothing else is shown; yields whether this may be: nothing was, and this process speaks for all."""
    first = os.environ.get("RANK", "0") == "0" and _BUSY.acquire(blocking=False)
    try:
        yield first
    finally:
        if first:
            _BUSY.release()


@contextlib.contextmanager
def counted(what: str, total: int | None, *, unit: str = "rows", shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show how far a loop outside training is.

    Args:
        what: is done.
        total: how much there is; None where no one knows.
        unit: of that.
        shown: whether this process shows anything.

    Yields:
        A function that takes how much more is done.
    """
    with alone() as first:
        if not (first and shown):
            yield lambda count: None
            return
        display = _display(what, total, unit)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            display.update(what, done, total)

        try:
            yield advance
        finally:
            display.close()


def _display(what: str, total: float | None, unit: str) -> Shown:
    if in_notebook():
        board = board_of_cell()
        board.update(what, 0, total)
        return board
    return _Line(what, total) if console().is_terminal else _Plain(what, unit)


def working(what: str) -> contextlib.AbstractContextManager[Any]:
    """Show that something goes on of which no one knows how long it takes."""
    return counted(what, None)


def each(parts: Collection[T], what: str) -> Iterator[T]:
    """The parts one after the other, and how many of them are done."""
    with counted(what, len(parts), unit="batches") as advance:
        for part in parts:
            yield part
            advance(1)
