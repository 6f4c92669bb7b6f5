"""Texts that are almost alike, found by MinHash. Called by `check`.

A text is the set of its runs of three words; in scripts without spaces, of three characters. rensa hashes the runs and
makes the signature; texts that share a band of it are compared set by set, so that what is reported is exact and only
what is missed is chance.

The index of bands is a dictionary of our own and not `rensa.RMinHashLSH`, whose query returns every text of a bucket:
rows that share a long system prompt are half alike, so that each query returns most of the rows before it. Of 3,000
such rows (150 words of 220 shared) it took 55.6 s of CPU time against 1.0 s here; of 20,000 rows of other texts
1.9 s against 2.7 s.
"""

from __future__ import annotations

import re

import numpy as np
from rensa import RMinHash  # type: ignore[attr-defined]  # compiled; its stub leaves the name out

# 64 hashes in 16 bands of 4: texts with a Jaccard similarity of 0.8 share a band with a chance above 0.999, of 0.5,
# 0.64.
HASHES, BAND = 64, 4
SIMILAR = 0.8
_SEED = 20
_COMPARED = 4  # members of a bucket that a text is compared with; more of one kind are alike among themselves
# Scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese. Each character is a word.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff])"
)


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case; of scripts without spaces, the characters.

    Example:
        >>> words_of("The sky"), words_of("天空 is 蓝")
        (['the', 'sky'], ['天', '空', 'is', '蓝'])
    """
    if text.isascii():
        return text.lower().split()
    # Half a character, which Python can hold and UTF-8 cannot, is `?`.
    return _UNSPACED.sub(r" \1 ", text.encode("utf-8", "replace").decode()).lower().split()


class NearDuplicates:
    """Texts that were seen, to be asked whether another one is almost like one of them.

    Example:
        >>> seen = NearDuplicates()
        >>> words = " ".join(str(n) for n in range(40))
        >>> seen.add(words), seen.add(words + " more"), seen.add("something else altogether, in other words")
        (None, 0, None)
    """

    def __init__(self) -> None:
        self._sets: list[np.ndarray] = []
        self._buckets: list[dict[bytes, list[int]]] = [{} for _ in range(HASHES // BAND)]

    def add(self, text: str, apart: str = "") -> int | None:
        """Remember a text; the number of the first one that it is almost like, counted from 0, or None. Texts with
        another `apart`, such as what tells their images, are never alike."""
        runs, keys = _keys(text, apart)
        found = self._closest(runs, keys)
        number = len(self._sets)
        self._sets.append(runs)
        for bucket, key in zip(self._buckets, keys, strict=True):
            members = bucket.setdefault(key, [])
            if len(members) < _COMPARED:
                members.append(number)
        return found

    def find(self, text: str, apart: str = "") -> int | None:
        """The number of the first text that this one is almost like, or None; it is not remembered."""
        return self._closest(*_keys(text, apart))

    def _closest(self, runs: np.ndarray, keys: list[bytes]) -> int | None:
        candidates = {number for bucket, key in zip(self._buckets, keys, strict=True) for number in bucket.get(key, ())}
        return next((number for number in sorted(candidates) if jaccard(runs, self._sets[number]) >= SIMILAR), None)


def _keys(text: str, apart: str) -> tuple[np.ndarray, list[bytes]]:
    """Hashes of the distinct runs of a text, sorted: uint64 `[S]`, at least one; and the bands that it is found by."""
    words = words_of(text)
    runs = list(map(" ".join, zip(words, words[1:], words[2:], strict=False))) or [" ".join(words)]
    if apart:
        runs = [f"{apart}\0{run}" for run in runs]
    sketch = RMinHash(HASHES, _SEED)
    sketch.update(runs)
    signature = np.array(sketch.digest(), dtype=np.uint32)
    hashes = np.array(RMinHash.hash_token_sets([runs])[0], dtype=np.uint64)
    return np.unique(hashes), [signature[start : start + BAND].tobytes() for start in range(0, HASHES, BAND)]


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """What two sorted sets share, of what they have together."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
