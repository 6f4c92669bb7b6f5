"""Tokenise words instead of texts where that is exact: a word that was seen before is looked up. Called by `tokenize`.

A byte-level tokenizer first cuts a text into pieces by a pattern and then merges bytes inside each piece only. Between
a letter and a space that another letter follows, such patterns always cut, whatever stands around. So the ids of a text
are those of its parts between such places, and most parts of a text have been seen before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.compat.tokenizers import description

Encode = Callable[[list[str]], list[list[int]]]
# The space itself is taken out, so that what follows can be looked up as it is.
_CUT = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")
_PROBES = (
    "A bc de",
    "it's so I'd say 3 x y\n\nz a  b c",
    "a <b>c d</b> e f, g (h i) É k L mN o",
    "AB Cd\tE f\r\ng hI jK",
)
_PIECES = ("ByteLevel", "Split", "Digits", "Punctuation")
_MOST = 2**20
_CHECKED = 32


class WordMemory:
    """Ids of parts of texts, see above; make it with `of`.

    Args:
        encode: the plain way: ids of texts.
        tokens: added tokens; what stands before and after one of them is tokenised apart.
    """

    def __init__(self, encode: Encode, tokens: Sequence[str] = ()) -> None:
        self._encode = encode
        self._first: dict[str, list[int]] = {}
        self._after_space: dict[str, list[int]] = {}
        self._to_check = _CHECKED
        # The longest first, as the tokenizer takes the longest that begins at a place.
        alternatives = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
        self._token = re.compile(f"({alternatives})") if tokens else None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, encode: Encode) -> WordMemory | None:
        """A memory for a tokenizer that cuts where `_CUT` says; None for any other."""
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if not tokenizer.is_fast or backend is None or not cuts_at_words(backend):
            return None
        return cls(encode, () if getattr(tokenizer, "split_special_tokens", False) else tokens_apart(backend))

    def encode(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Ids of texts; None where, against all expectation, the first ones are not those of the plain way.

        Texts that begin with an earlier one, with only such texts between, cost what they add to it. So a prompt is
        best followed by its completions.
        """
        parts, begins = _parts(texts)
        self._learn(parts, begins)
        first, after = self._first, self._after_space
        result: list[list[int]] = []
        for own, begin in zip(parts, begins, strict=True):
            if begin is None:
                ids = first[own[0]].copy()
                ids.extend(chain.from_iterable(map(after.__getitem__, own[1:])))
            else:
                ids = result[begin][: len(result[begin]) - len(after[parts[begin][-1]])]
                ids.extend(chain.from_iterable(map(after.__getitem__, own)))
            result.append(ids)
        cut = [i for i, own in enumerate(parts) if len(own) > 1 or begins[i] is not None][: self._to_check]
        self._to_check -= len(cut)
        if self._encode([texts[i] for i in cut]) != [result[i] for i in cut]:
            return None
        return result

    def _learn(self, parts: list[list[str]], begins: list[int | None]) -> None:
        if len(self._first) + len(self._after_space) > _MOST:
            self._first, self._after_space = {}, {}
        whole = [own for own, begin in zip(parts, begins, strict=True) if begin is None]
        added = [own for own, begin in zip(parts, begins, strict=True) if begin is not None]
        heads = {own[0] for own in whole} - self._first.keys()
        rest = set().union(*(own[1:] for own in whole), *added) - self._after_space.keys()
        # A part with a control token is one of its kind, since a word stands on either side; what it is made of is not.
        pieces = {text: self._pieces(text) for text in chain(heads, (" " + word for word in rest))}
        new = list({piece for own in pieces.values() for piece in own} - self._first.keys())
        self._first.update(zip(new, self._encode(new), strict=True))
        self._after_space.update((word, self._joined(pieces[" " + word])) for word in rest)
        self._first.update((head, self._joined(pieces[head])) for head in heads)

    def _pieces(self, text: str) -> list[str]:
        return [text] if self._token is None else [piece for piece in self._token.split(text) if piece] or [text]

    def _joined(self, pieces: list[str]) -> list[int]:
        return list(chain.from_iterable(map(self._first.__getitem__, pieces)))


def _parts(texts: Sequence[str]) -> tuple[list[list[str]], list[int | None]]:
    """The parts of each text, and the number of the earlier text that it begins with.

    What such a text has up to its last cut nothing behind it can change, so the parts are those from there on.
    """
    parts: list[list[str]] = []
    begins: list[int | None] = []
    begin: int | None = None
    for number, text in enumerate(texts):
        if begin is not None and text.startswith(texts[begin]):
            parts.append(_CUT.split(parts[begin][-1] + text[len(texts[begin]) :]))
            begins.append(begin)
            continue
        parts.append(_CUT.split(text))
        begins.append(None)
        begin = number if len(parts[-1]) > 1 else None
    return parts, begins


def tokens_apart(backend: Any) -> tuple[str, ...]:
    """Added tokens of a `tokenizers.Tokenizer` that `cuts_at_words` which are found before all else in a text.

    Those that are looked for in normalised text are found only in what these leave.
    """
    if backend.encode_special_tokens:
        return ()
    added = description(backend).get("added_tokens", ())
    return tuple(token["content"] for token in added if token["content"] and not token["normalized"])


def cuts_at_words(backend: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` always begins a new piece at a space between two letters.

    It must merge inside pieces only and in one way (byte-level BPE without dropout), change no letters before that,
    know no added token that such a place may be inside of or that takes spaces around it, and cut the probes there.
    """
    made_of = description(backend)
    model, normalizer, cutter = (made_of.get(name) or {} for name in ("model", "normalizer", "pre_tokenizer"))
    pieces = cutter.get("pretokenizers", [cutter])
    byte_level = [piece for piece in pieces if piece.get("type") == "ByteLevel"]
    if model.get("type") != "BPE" or model.get("dropout") or normalizer.get("type") not in (None, "NFC"):
        return False
    if not byte_level or any(piece.get("type") not in _PIECES for piece in pieces):
        return False
    if any(piece.get("add_prefix_space") for piece in byte_level):
        return False
    for token in made_of.get("added_tokens", ()):
        if token["lstrip"] or token["rstrip"] or token["single_word"] or _CUT.search(token["content"]):
            return False
    for probe in _PROBES:
        begins = {start for _, (start, _) in backend.pre_tokenizer.pre_tokenize_str(probe)}
        if not {match.start() for match in _CUT.finditer(probe)} <= begins:
            return False
    return True
