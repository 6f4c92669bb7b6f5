"""Tokenise words instead of texts where that is exact: a word that was seen before is looked up. Called by `tokenize`.

A byte-level tokenizer first cuts a text into pieces by a pattern and then merges bytes inside each piece only. Between
a letter and a space that another letter follows, such patterns always cut, whatever stands around. So the ids of a text
are those of its parts between such places, and most parts of a text have been seen before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

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
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._first: dict[str, list[int]] = {}
        self._after_space: dict[str, list[int]] = {}
        self._to_check = _CHECKED

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, encode: Encode) -> WordMemory | None:
        """A memory for a tokenizer that cuts where `_CUT` says; None for any other."""
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if not tokenizer.is_fast or backend is None:
            return None
        return cls(encode) if cuts_at_words(backend) else None

    def encode(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Ids of texts; None where, against all expectation, the first ones are not those of the plain way."""
        parts = [_CUT.split(text) for text in texts]
        self._learn(parts)
        first, after = self._first, self._after_space
        result: list[list[int]] = []
        for head, *rest in parts:
            ids = first[head].copy()
            for part in rest:
                ids += after[part]
            result.append(ids)
        cut = [i for i, own in enumerate(parts) if len(own) > 1][: self._to_check]
        self._to_check -= len(cut)
        if self._encode([texts[i] for i in cut]) != [result[i] for i in cut]:
            return None
        return result

    def _learn(self, parts: list[list[str]]) -> None:
        if len(self._first) + len(self._after_space) > _MOST:
            self._first, self._after_space = {}, {}
        heads = list({part[0] for part in parts} - self._first.keys())
        rest = list({word for part in parts for word in part[1:]} - self._after_space.keys())
        ids = self._encode([*heads, *(" " + word for word in rest)])
        self._first.update(zip(heads, ids, strict=False))
        self._after_space.update(zip(rest, ids[len(heads) :], strict=True))


def cuts_at_words(backend: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` always begins a new piece at a space between two letters.

    It must merge inside pieces only and in one way (byte-level BPE without dropout), change no letters before that,
    know no added token that such a place may be inside of or that takes spaces around it, and cut the probes there.
    """
    made_of = cast(dict[str, Any], json.loads(backend.to_str()))
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
