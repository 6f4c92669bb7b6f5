"""Rows that share a key, found among any number of rows in bounded memory. Called by `audit`.

A record is a key and a row. Records are kept in pieces by their keys, on disk where they are many; a piece is sorted
and its groups are looked at together, so that nothing but one piece is ever in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

# Records of a piece, of 16 bytes; and how many wait in memory until they are put to their pieces.
PIECE, _WAITING = 2**20, 2**20
_MOST_PIECES = 4096
RECORD = np.dtype([("key", np.uint64), ("row", np.int64)])


class Groups:
    """Records by key.

    Args:
        expected: about how many records will come; says how many pieces there are.

    Example:
        >>> groups = Groups(4)
        >>> groups.add([7, 5, 7], [0, 1, 2])
        >>> [(piece["row"].tolist(), starts.tolist()) for piece, starts in groups.pieces()]
        [([1, 0, 2], [0, 1, 1])]
    """

    def __init__(self, expected: int) -> None:
        self._count = min(max(-(-expected // PIECE), 1), _MOST_PIECES)
        self._waiting: list[np.ndarray] = []
        self._held = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, keys: Sequence[int] | np.ndarray, rows: Sequence[int] | np.ndarray) -> None:
        """Add records; rows come in ascending order."""
        records = np.empty(len(keys), RECORD)
        records["key"], records["row"] = np.asarray(keys, np.uint64), rows
        self._waiting.append(records)
        self._held += len(records)
        if self._count > 1 and self._held >= _WAITING:
            self._put()

    def _taken(self) -> np.ndarray:
        """What waits in memory, which is then empty."""
        waiting, self._waiting, self._held = self._waiting, [], 0
        return np.concatenate([np.empty(0, RECORD), *waiting])

    def _put(self) -> None:
        records = self._taken()
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="tether-check-")
        # By the upper half of a key: the whole range of keys is cut into pieces of equal width.
        places = ((records["key"] >> np.uint64(32)) * np.uint64(self._count)) >> np.uint64(32)
        order = np.argsort(places, kind="stable")
        ends = np.cumsum(np.bincount(places.astype(np.int64), minlength=self._count))
        for number, part in enumerate(np.split(records[order], ends[:-1])):
            if len(part):
                with open(self._path(number), "ab") as file:
                    part.tofile(file)

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / str(number)

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each piece once: records by key, then by row, and for each the place of the first one of its group."""
        if self._folder is None:
            yield _grouped(self._taken())
            return
        self._put()
        with self._folder:
            for number in range(self._count):
                if (path := self._path(number)).exists():
                    yield _grouped(np.fromfile(path, RECORD))


def _grouped(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    records = records[np.argsort(records["key"], kind="stable")]
    keys, places = records["key"], np.arange(len(records))
    new = np.ones(len(records), bool)
    new[1:] = keys[1:] != keys[:-1]
    return records, np.maximum.accumulate(np.where(new, places, 0)) if len(records) else places


def first_own(records: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of each record, the place of the first one of its group whose row is not below 0."""
    inside = np.concatenate([[0], np.cumsum(records["row"] < 0)])
    ends = np.searchsorted(starts, starts, side="right")
    return starts + inside[ends] - inside[starts]


def short(digest: bytes) -> int:
    """The first half of a digest as a key: two of a hundred million rows meet by chance once in 4,000 sets."""
    return int.from_bytes(digest[:8], "little")
