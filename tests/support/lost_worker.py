"""Workers of Ray that fail as machines do: one is killed in the midst of a shard, another is slow."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tether.cli.precompute import pool

_WHOLE = pool.Worker


class Failing(_WHOLE):
    """Says in files of the current folder what became of each shard; the first pass of shard 2 kills its process."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        import tether.training.store as store

        [shard] = map(int, batch["id"])
        trainer = self._made()
        with Path("tried.txt").open("a") as file:
            file.write(f"{shard} {os.getpid()}\n")
        scored = store._score

        def one_pass(stored: Any, *others: Any) -> None:
            scored(stored, *others)
            if shard == 2 and not Path("killed").exists():
                stored.flush()  # as the half minute would
                Path("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        store._score = one_pass
        try:
            if shard == 0:
                time.sleep(3)
            assert trainer is not None
            return super().__call__(batch)
        finally:
            store._score = scored
