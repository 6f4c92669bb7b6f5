"""`--launch N`: N processes of the same command on this machine, as torchrun starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import typer

from tether.compat.launcher import launched
from tether.errors import ConfigError

# What is passed on to every process; a second one of a kind too, which stops a run at once.
_PASSED_ON = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
# Seconds that the others have to end by themselves once one has failed, and then to end when they are told to.
_GRACE, _KILL = 15.0, 30.0
_POLL = 0.1


def launch(count: int, command: Sequence[str]) -> int:
    """Run a command of Tether in several processes, and wait for them.

    Args:
        count: how many.
        command: words after `tether`.

    Returns:
        0 where all ended well, else the exit code of the first that did not; 128 and the number of a signal that ended
        it.

    Raises:
        ConfigError: this process is one of several already.
    """
    if launched():
        raise ConfigError(
            f"--launch {count} was given, and a launcher has started this process as one of several. Leave one of the "
            "two out."
        )
    settings = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    settings.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        settings["MASTER_PORT"] = str(probe.getsockname()[1])
    words = [sys.executable, "-m", "tether", *command]
    started: list[subprocess.Popen[bytes]] = []
    with _Passing(started):
        try:
            for rank in range(count):
                own = {**settings, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A group of its own, so that a Ctrl-C of the terminal comes once, from here.
                started.append(subprocess.Popen(words, env=own, process_group=0))
            return _wait(started)
        finally:
            _end(started)


class _Passing:
    """Passes signals on to processes while it is entered."""

    def __init__(self, started: Sequence[subprocess.Popen[bytes]]) -> None:
        self._started = started
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._pass_on) for number in _PASSED_ON}

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: Any) -> None:
        for process in self._started:
            if process.poll() is None:
                process.send_signal(number)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of all; when one fails, the others are waited for, then ended."""
    failed: tuple[int, int] | None = None
    deadline = 0.0
    while True:
        codes = [process.poll() for process in started]
        if failed is None:
            failed = next(((rank, code) for rank, code in enumerate(codes) if code), None)
            deadline = time.monotonic() + _GRACE
        if None not in codes or (failed is not None and time.monotonic() > deadline):
            break
        time.sleep(_POLL)
    if failed is None:
        return 0
    rank, code = failed
    ended = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    typer.echo(f"Process {rank} of {len(started)} ended {ended}.", err=True)
    return 128 - code if code < 0 else code


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: asked first, then killed."""
    for process in started:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _KILL
    for process in started:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
