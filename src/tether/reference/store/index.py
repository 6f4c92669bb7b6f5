"""The store's index in memory: sorted keys and the part and row of each, 28 bytes a completion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from tether.reference.store.parts import KEY_BYTES, PartIndex

_COLUMNS = {
    "high": np.uint64,
    "low": np.uint64,
    "part": np.int32,
    "row": np.uint32,
    "crc": np.uint32,
}


class KeyIndex:
    """Finds 16-byte keys by binary search; a key may be in several parts.

    Example:
        >>> index = KeyIndex()
        >>> index.find([b"k" * 16]).tolist()
        [-1]
    """

    def __init__(self) -> None:
        self._set({name: np.empty(0, dtype) for name, dtype in _COLUMNS.items()})

    def _set(self, columns: Mapping[str, np.ndarray]) -> None:
        self.high, self.low = columns["high"], columns["low"]
        self.part, self.row, self.crc = columns["part"], columns["row"], columns["crc"]

    def _columns(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in _COLUMNS}

    def __len__(self) -> int:
        return len(self.high)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(column.nbytes for column in self._columns().values())

    @property
    def unique(self) -> int:
        """Keys, each counted once."""
        if not len(self):
            return 0
        again = (self.high[1:] == self.high[:-1]) & (self.low[1:] == self.low[:-1])
        return len(self) - int(again.sum())

    def add(self, parts: Iterable[tuple[int, PartIndex]]) -> None:
        """Add parts by their numbers; those added first are found first."""
        pieces = [self._columns()]
        for number, part in parts:
            high, low = _halves(part.keys)
            place = {"part": np.full(len(high), number, np.int32), "row": np.arange(len(high), dtype=np.uint32)}
            pieces.append({"high": high, "low": low, **place, "crc": part.crcs})
        if len(pieces) == 1:
            return

        def joined(name: str) -> np.ndarray:
            return np.concatenate([piece[name] for piece in pieces])

        # Column by column: a store of a million completions is opened in little more memory than its index takes.
        order = np.lexsort((joined("low"), joined("high")))
        self._set({name: joined(name)[order] for name in _COLUMNS})

    def remove(self, part: int) -> None:
        """Forget every key of a part."""
        kept = self.part != part
        self._set({name: column[kept] for name, column in self._columns().items()})

    def find(self, keys: list[bytes]) -> np.ndarray:
        """Position of each key in the index, int64 `[k]`; -1 where there is none."""
        if not keys or not len(self):
            return np.full(len(keys), -1, np.int64)
        high, low = _halves(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES))
        rows = np.searchsorted(self.high, high)
        inside = rows < len(self)
        at = np.minimum(rows, len(self) - 1)
        found = inside & (self.high[at] == high) & (self.low[at] == low)
        # Two keys may share their first half; the second halves are in order behind it.
        for i in np.nonzero(inside & (self.high[at] == high) & ~found)[0]:
            last = np.searchsorted(self.high, high[i], side="right")
            row = rows[i] + np.searchsorted(self.low[rows[i] : last], low[i])
            if row < last and self.low[row] == low[i]:
                rows[i], found[i] = row, True
        return np.where(found, rows, -1)


def _halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    halves = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
    return halves[:, 0], halves[:, 1]
