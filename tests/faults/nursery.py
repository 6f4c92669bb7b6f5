"""Runs the real command line in forked children that can be killed at a chosen file operation, or find the disk full.

A process of its own, so that torch is imported once and never computes before a fork. One request a line on standard
input, as JSON; one answer a line.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


class Watch:
    """Counts changes of files below a folder, and does what was asked at one of them.

    Args:
        below: the folder.
        record: a file that lists the changes; empty for none.
        kill: number of the change that the process does not live to make; -1 for none.
        torn: leave the file of that change half written.
        full: number of the first change that finds the disk full; -1 for none.
        times: how many changes find it full.
    """

    def __init__(
        self, below: str, record: str = "", kill: int = -1, torn: bool = False, full: int = -1, times: int = 10**6
    ) -> None:
        self._below, self._kill, self._torn, self._full, self._times = below, kill, torn, full, times
        self._log = open(record, "w", encoding="utf-8") if record else None  # noqa: SIM115 - as long as the process
        self._count, self._quiet = 0, False

    def install(self) -> None:
        import safetensors.torch
        import torch

        sys.addaudithook(self._audit)
        torch.save = self._half_first(torch.save)
        safetensors.torch.serialize_file = self._half_first(safetensors.torch.serialize_file)

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            path, mode, flags = arguments
            text = isinstance(mode, str)
            writes = any(c in mode for c in "wax+") if text else isinstance(flags, int) and bool(flags & _WRITES)
            if writes and isinstance(path, (str, bytes, os.PathLike)):
                empties = text and "w" in mode
                self._change(name, os.fsdecode(path), lambda: open(path, "w" if empties else "a").close())
        elif name in _CHANGES and not isinstance(arguments[0], int):
            self._change(name, os.fsdecode(arguments[0]), None)

    def _half_first(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def watched(what: Any, where: Any, *others: Any, **named: Any) -> Any:
            if isinstance(where, (str, os.PathLike)):

                def half() -> None:
                    write(what, where, *others, **named)
                    os.truncate(where, os.path.getsize(where) // 2)

                self._change("write", os.fspath(where), half)
            return write(what, where, *others, **named)

        return watched

    def _change(self, name: str, path: str, half: Callable[[], None] | None) -> None:
        if self._quiet or self._below not in os.path.abspath(path):
            return
        number, self._count = self._count, self._count + 1
        if self._log:
            self._log.write(json.dumps([number, name, path]) + "\n")
            self._log.flush()
        if number == self._kill:
            self._quiet = True
            if self._torn and half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        # Removing needs no space; that is how some is made.
        if self._full >= 0 and self._full <= number < self._full + self._times and name in ("open", "write"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def child(request: dict[str, Any]) -> int:
    """What a fork does: one command."""
    from tether.cli.main import main
    from tether.training.saving import atomic_checkpoint

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["home"])
    atomic_checkpoint._PAUSES = (0.0, 0.0)
    if request.get("watch"):
        Watch(**request["watch"]).install()
    if request.get("slow"):
        from tether.training.trainer import TetherTrainer

        quick = TetherTrainer.training_step

        def slowly(*arguments: Any, **named: Any) -> Any:
            time.sleep(request["slow"])
            return quick(*arguments, **named)

        TetherTrainer.training_step = slowly  # type: ignore[method-assign]
    return main(request["argv"])


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a child, kill it after some seconds if that is asked for, and say how it ended."""
    said = Path(request["home"]) / "said.txt"
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 98
        try:
            out = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            code = child(request)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    after, number = request.get("after"), request.get("signal", signal.SIGKILL)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - began
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return {"code": code, "seconds": seconds, "said": said.read_text("utf-8", "replace")}
        if seconds > request.get("limit", 240):
            os.kill(pid, signal.SIGKILL)
        elif after is not None and seconds > after:
            os.kill(pid, number)
            after = None
        time.sleep(0.01)


def prepare(folder: Path) -> None:
    """A tiny model with dropout, a second one of other weights, and a tokenizer, for all runs below a folder."""
    from tiny import tiny_model, tiny_tokenizer

    pid = os.fork()
    if pid == 0:
        for name, seed in (("model", 0), ("other", 1)):
            tokenizer = tiny_tokenizer()
            model = tiny_model(seed=seed, dropout=True, vocab_size=len(tokenizer), attention_dropout=0.1)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def serve(folder: Path) -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    import datasets
    import torch

    import tether.config
    import tether.report
    import tether.training  # noqa: F401 - before the forks

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    prepare(folder)
    answers.write("ready\n")
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    Path(sys.argv[1]).mkdir(parents=True)
    serve(Path(sys.argv[1]))
