"""Texts that are almost alike, found by MinHash. Called by `audit`.

A text is the set of its runs of three words; in scripts without spaces, of three characters. Words are hashed once,
runs from the hashes of their words; texts that share a band of their signatures are compared set by set, so that what
is reported is exact and only what is missed is chance.

What is kept of a text is its signature, 256 bytes, and 16 records of 16 bytes, both on disk where there are many; the
texts themselves are read again where two signatures say that they may be alike.

Signing and index are our own. rensa's index returns every text of a bucket: rows that share a long system prompt are
half alike, so that each query returns most of the rows before it (3,000 such rows of 150 words of 220 took it 55.6 s).
Its signing wants every run as a text, and its threads hang in a process that was forked, as those of a check are.
"""

from __future__ import annotations

import re
import tempfile
import weakref
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from tether.data.audit.groups import Groups, first_own

# 64 hashes in 16 bands of 4: texts with a Jaccard similarity of 0.8 share a band with a chance above 0.999, of 0.5,
# 0.64.
HASHES, BAND = 64, 4
SIMILAR = 0.8
# Of 64 hashes, so many equal ones are compared: fewer of texts that are 0.8 alike come by a chance of 0.0001.
_EQUAL = 38
_COLUMNS = 4096  # hashes of a text that are signed at a time
_WORDS, _LONG = 2**18, 64  # words whose hashes are kept, and the longest of them
_COMPARED = 4  # members of a bucket that a text is compared with; more of one kind are alike among themselves
_PAIRS, _READ = 2**16, 512  # pairs whose signatures are compared at a time, and whose texts are read again
# Scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese. Each character is a word.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff])"
)
# Texts by their numbers, each with what keeps it apart from others, such as what tells its images.
Texts = Callable[[Sequence[int]], list[tuple[str, str]]]


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
    """Texts that were seen, each under a number; those below 0 are of another set, which the others are held against.

    Args:
        expected: about how many texts will come.

    Example:
        >>> words = " ".join(str(n) for n in range(40))
        >>> texts = [(words, ""), (words + " more", ""), ("something else altogether, in other words", "")]
        >>> seen = NearDuplicates(3)
        >>> seen.add([0, 1, 2], texts)
        >>> alike, _ = seen.alike(lambda numbers: [texts[number] for number in numbers], 3)
        >>> alike.tolist()
        [False, True, False]
    """

    def __init__(self, expected: int) -> None:
        self._groups = Groups(expected * (HASHES // BAND))
        self._signatures = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the object
        weakref.finalize(self, self._signatures.close)
        self._numbers: list[np.ndarray] = []

    def add(self, numbers: Sequence[int], texts: Sequence[tuple[str, str]]) -> None:
        """Remember texts. All calls together have ascending numbers."""
        if not numbers:
            return
        self.add_signed(numbers, signed(texts))

    def add_signed(self, numbers: Sequence[int], signatures: np.ndarray) -> None:
        """Remember texts by what `signed` gave of them, in the same order as by `add`."""
        signatures.tofile(self._signatures)
        self._numbers.append(np.array(numbers, np.int64))
        keys = _mixed(np.ascontiguousarray(signatures).view(np.uint64).reshape(len(numbers), -1, BAND // 2))
        self._groups.add(keys.ravel(), np.repeat(self._numbers[-1], HASHES // BAND))

    def alike(self, texts: Texts, rows: int, known: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Which texts are almost like an earlier one, and which like one of the other set: bool `[rows]` both.

        Args:
            texts: reads some again.
            rows: one more than the greatest number.
            known: texts that are not asked for, bool `[rows]`: exact repetitions.
        """
        own, foreign = np.zeros(rows, bool), np.zeros(rows, bool)
        if not self._numbers:
            return own, foreign
        self._signatures.flush()
        numbers = np.concatenate(self._numbers)
        signatures = np.memmap(self._signatures, np.uint32, "r", shape=(len(numbers), HASHES))
        compared = _Comparison(texts, numbers, signatures)
        for records, starts in self._groups.pieces():
            first, found = first_own(records, starts), records["row"]
            places = np.arange(len(records))
            for step in range(_COMPARED):
                asked = places > first + step
                asked[asked] &= True if known is None else ~known[found[asked]]
                compared.compare(found[asked], found[first[asked] + step], own)
                asked = (found >= 0) & (first - starts > step)
                compared.compare(found[asked], found[starts[asked] + step], foreign)
        return own, foreign


class _Comparison:
    """Texts that are compared, each with another one."""

    def __init__(self, texts: Texts, numbers: np.ndarray, signatures: np.ndarray) -> None:
        self._texts, self._numbers, self._signatures = texts, numbers, signatures

    def compare(self, rows: np.ndarray, others: np.ndarray, alike: np.ndarray) -> None:
        """Mark each row that is almost like its other one, unless it is marked already."""
        for start in range(0, len(rows), _PAIRS):
            pairs = np.stack([rows[start : start + _PAIRS], others[start : start + _PAIRS]], 1)
            pairs = pairs[~alike[pairs[:, 0]]]
            one, other = (self._signatures[np.searchsorted(self._numbers, pairs[:, k])] for k in (0, 1))
            pairs = np.unique(pairs[(one == other).sum(1) >= _EQUAL], axis=0)
            for first in range(0, len(pairs), _READ):
                self._read(pairs[first : first + _READ], alike)

    def _read(self, pairs: np.ndarray, alike: np.ndarray) -> None:
        wanted = np.unique(pairs).tolist()
        sets = dict(zip(wanted, map(np.unique, _hashes(self._texts(wanted))), strict=True))
        for row, other in pairs.tolist():
            alike[row] = alike[row] or jaccard(sets[row], sets[other]) >= SIMILAR


def _scrambled(keys: np.ndarray) -> np.ndarray:
    """Numbers of 64 bits, each mapped to one that looks drawn (the last part of splitmix64)."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


class _Hashes(dict[str, int]):
    """Hashes of words, of which those met lately are kept."""

    def __missing__(self, word: str) -> int:
        found = int.from_bytes(blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        if len(word) <= _LONG:
            if len(self) >= _WORDS:
                self.clear()
            self[word] = found
        return found


_HASHES = _Hashes()
# Of a linear map for each place of a signature: odd factors and summands, from one stream of mixed numbers.
_FACTORS, _SUMMANDS = (
    (_scrambled(np.arange(first, first + HASHES, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32)[:, None]
    for first in (1, 1 + HASHES)
)
_FACTORS |= np.uint32(1)


def signed(texts: Sequence[tuple[str, str]]) -> np.ndarray:
    """Signatures of texts: uint32 `[texts, HASHES]`, equal at a place with the chance of their similarity."""
    found = np.empty((len(texts), HASHES), np.uint32)
    for place, hashes in enumerate(_hashes(texts)):
        short = (hashes >> np.uint64(32)).astype(np.uint32)
        found[place] = (_FACTORS * short[:_COLUMNS] + _SUMMANDS).min(1)
        for start in range(_COLUMNS, len(short), _COLUMNS):
            np.minimum(found[place], (_FACTORS * short[start : start + _COLUMNS] + _SUMMANDS).min(1), out=found[place])
    return found


def _hashes(texts: Sequence[tuple[str, str]]) -> list[np.ndarray]:
    """Hashes of the runs of texts, at least one each; uint64, as often as a run occurs."""
    found = []
    for text, apart in texts:
        words = words_of(text)
        if len(words) < 3:
            words = [" ".join(words)]
        of_words = np.fromiter(map(_HASHES.__getitem__, words), np.uint64, len(words))
        if len(words) >= 3:
            runs = of_words[:-2] * np.uint64(3) + _scrambled(of_words[1:-1]) + of_words[2:] * np.uint64(5)
        else:
            runs = of_words
        found.append(_scrambled(runs + np.uint64(_HASHES[apart])))
    return found


def _mixed(bands: np.ndarray) -> np.ndarray:
    """Keys of bands `[N, bands, halves]`, uint64; bands at different places have different ones."""
    keys = np.arange(1, bands.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    keys = np.broadcast_to(keys, bands.shape[:2])
    for half in range(bands.shape[2]):
        keys = _scrambled(keys ^ bands[:, :, half])
    return keys


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """What two sorted sets share, of what they have together."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
