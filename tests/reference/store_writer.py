"""Processes that fill one store and are killed, for `test_store_kills.py`.

Started once: it imports the store, then forks a writer for each line `start SEED` on standard input and answers with
its process id. A writer puts completions for ever; after each flush it appends to its log how many it has flushed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from tether.reference.store.parts import Namespace
from tether.reference.store.store import Store

SPACE = Namespace("s2:00ff", "float32")


def key_of(number: int) -> bytes:
    """The digest of a completion that every writer knows."""
    return number.to_bytes(16, "little")


def value_of(number: int) -> np.ndarray:
    """The only right value of it: uneven in length, different in each token."""
    return -(np.arange(1 + number * 7 % 50, dtype=np.float32) + number % 1000) / 8


def write(path: str, seed: int, total: int) -> None:
    """Put random completions in batches of 8, a flush every few batches."""
    random = np.random.default_rng(seed)
    store = Store(path, SPACE, flush_bytes=10**9, flush_seconds=1e9)
    log = open(Path(path).parent / f"{seed}.log", "a", buffering=1)  # noqa: SIM115
    while True:
        for _ in range(int(random.integers(1, 30))):
            numbers = [int(number) for number in random.integers(0, total, 8)]
            store.put([key_of(number) for number in numbers], [value_of(number) for number in numbers])
        waiting = [int.from_bytes(content, "little") for content in _contents(store)]
        store.flush()
        log.write(" ".join(map(str, waiting)) + "\n")


def _contents(store: Store) -> list[bytes]:
    """Which completions the next flush writes."""
    return [_NAMES[key] for key in store._pending]


_NAMES: dict[bytes, bytes] = {}


def main(path: str, total: int) -> None:
    """Fork writers on request."""
    _NAMES.update({SPACE.key(key_of(number)): key_of(number) for number in range(total)})
    for line in sys.stdin:
        if line.startswith("start"):
            child = os.fork()
            if child == 0:
                write(path, int(line.split()[1]), total)
            print(child, flush=True)
        elif line.startswith("reap"):
            print(os.waitpid(int(line.split()[1]), 0)[1], flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
