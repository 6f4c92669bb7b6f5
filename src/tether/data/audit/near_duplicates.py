"""Texts that are almost alike, found by MinHash. Called by `check`.

A text is the set of its runs of three words; in scripts without spaces, of three characters. One hash of the set,
permuted by its own low bits into bins, gives a signature in one pass (one-permutation hashing, Li, Owen and Zhang,
arXiv:1208.1259); texts that share a band of it are compared set by set, so that what is reported is exact and only
what is missed is chance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b
from zlib import crc32

import numpy as np

# 64 bins in 16 bands of 4: texts with a Jaccard similarity of 0.8 share a band with a chance above 0.999, of 0.5, 0.64.
BINS, BAND = 64, 4
SIMILAR = 0.8
_COMPARED = 4  # members of a bucket that a text is compared with; more of one kind are alike among themselves
_SEEDS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)


# Scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese. Each character is a word.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
)


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case; of scripts without spaces, the characters.

    Example:
        >>> words_of("The sky"), words_of("天空 is 蓝")
        (['the', 'sky'], ['天', '空', 'is', '蓝'])
    """
    return (text if text.isascii() else _UNSPACED.sub(r" \1 ", text)).lower().split()


class NearDuplicates:
    """Texts that were seen, to be asked whether another one is almost like one of them.

    Example:
        >>> seen = NearDuplicates()
        >>> words = " ".join(str(n) for n in range(40))
        >>> seen.add(words), seen.add(words + " more"), seen.add("something else altogether, in other words")
        (None, 0, None)
    """

    def __init__(self) -> None:
        self._words = _Hashes()
        self._sets: list[np.ndarray] = []
        self._buckets: list[dict[bytes, list[int]]] = [{} for _ in range(BINS // BAND)]

    def add(self, text: str, apart: str = "") -> int | None:
        """Remember a text; the number of the first one that it is almost like, counted from 0, or None. Texts with
        another `apart`, such as what tells their images, are never alike."""
        shingles, keys = self._keys(text, apart)
        found = self._closest(shingles, keys)
        number = len(self._sets)
        self._sets.append(shingles)
        for bucket, key in zip(self._buckets, keys, strict=True):
            members = bucket.setdefault(key, [])
            if len(members) < _COMPARED:
                members.append(number)
        return found

    def find(self, text: str, apart: str = "") -> int | None:
        """The number of the first text that this one is almost like, or None; it is not remembered."""
        return self._closest(*self._keys(text, apart))

    def _closest(self, shingles: np.ndarray, keys: list[bytes]) -> int | None:
        candidates = {number for bucket, key in zip(self._buckets, keys, strict=True) for number in bucket.get(key, ())}
        return next((number for number in sorted(candidates) if jaccard(shingles, self._sets[number]) >= SIMILAR), None)

    def _keys(self, text: str, apart: str = "") -> tuple[np.ndarray, list[bytes]]:
        shingles = self.shingles(text, apart)
        bins = (shingles & np.uint64(BINS - 1)).astype(np.intp)
        signature = np.full(BINS, _EMPTY)
        np.minimum.at(signature, bins, shingles >> np.uint64(6))
        empty = signature == _EMPTY
        if empty.any():  # a bin that nothing fell into takes the next one's value, so that short texts can meet, too
            places = np.flatnonzero(~empty)
            next_filled = places[np.searchsorted(places, np.flatnonzero(empty)) % len(places)]
            signature[empty] = signature[next_filled]
        return shingles, [signature[start : start + BAND].tobytes() for start in range(0, BINS, BAND)]

    def shingles(self, text: str, apart: str = "") -> np.ndarray:
        """Hashes of the distinct runs of three words, sorted: uint64 `[S]`, at least one; others for each `apart`."""
        words = list(map(self._words.__getitem__, words_of(text))) or [0]
        row = np.array([*words, *[0] * (3 - len(words))], dtype=np.uint64)
        with np.errstate(over="ignore"):
            runs = row[:-2] * _SEEDS[0] + row[1:-1] * _SEEDS[1] + row[2:] * _SEEDS[2]
            runs += np.uint64(int.from_bytes(blake2b(apart.encode(), digest_size=8).digest()) if apart else 0)
            runs ^= runs >> np.uint64(33)
            runs *= _MIX
            runs ^= runs >> np.uint64(29)
        return np.unique(runs)


class _Hashes(dict[str, int]):
    """Words to their hashes, each computed once."""

    def __missing__(self, word: str) -> int:
        found = self[word] = crc32(word.encode("utf-8", "surrogatepass")) + 1
        return found


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """What two sorted sets share, of what they have together."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def near_duplicates(texts: Iterable[str]) -> list[int]:
    """Numbers, from 0, of the texts that are almost like an earlier one."""
    seen = NearDuplicates()
    return [number for number, text in enumerate(texts) if seen.add(text) is not None]
