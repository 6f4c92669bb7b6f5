"""What one row shows by itself, and by what it is told whether others repeat or contradict it. Called by `audit`."""

from __future__ import annotations

from hashlib import blake2b
from itertools import combinations
from typing import cast

from tether.data.audit.collector import Seen, asked, opening_of, parts
from tether.data.audit.language import detector, is_in_another_language, is_odd, is_refusal, script
from tether.data.prepare.report import MarkerFinder, digest
from tether.data.rows.values import is_blank, texts_of
from tether.types import Messages, Preference


def look(row: Preference, images: str, seen: Seen, finder: MarkerFinder) -> None:
    """Note what a row shows.

    Args:
        row: with its number among the rows that are looked at.
        images: what tells its images from others.
        seen: where it is noted.
        finder: of markers.
    """
    place = row.source_row
    if row.completions:
        alike = any(one in row.completions[:k] for k, one in enumerate(row.completions))
        seen.note("empty", place, any(map(is_blank, row.completions)))
        if len(row.completions) > 1:
            seen.note("identical", place, alike)
        if row.kind in ("pair", "ranked", "unpaired"):
            seen.note("contradictions", place, False)
            if not alike:
                _say(row, images, seen)
        _look_at_answers(row, seen)
    texts = [part for value in (row.prompt, *row.completions) for part in texts_of(value)]
    found = finder.find(texts)
    seen.markers.update(found)
    seen.note("markers", place, bool(found))
    if isinstance(row.prompt, list):
        seen.note("odd_roles", place, any(is_odd([*row.prompt, *cast(Messages, c)]) for c in row.completions or ([],)))
    seen.characters["prompt"][sum(map(len, texts_of(row.prompt)))] += 1


def _look_at_answers(row: Preference, seen: Seen) -> None:
    place = row.source_row
    answers = [" ".join(texts_of(completion)) for completion in row.completions]
    sizes = list(map(len, answers))
    first = answers[0]
    desirable = row.values.get("label", 1.0) == 1.0
    names = ("chosen", "rejected") if row.kind in ("pair", "ranked") else ("completion",)
    for part, size in zip(names, (sizes[0], sizes[-1]), strict=False):
        seen.characters[part][size] += 1
    if len(names) > 1:
        seen.note("longer_chosen", place, sizes[0] > sizes[-1])
        seen.note("refusals_rejected", place, is_refusal(answers[-1]))
        seen.unequal += sizes[0] != sizes[-1]
        seen.longer += sizes[0] > sizes[-1]
    seen.note("refusals", place, desirable and is_refusal(first))
    question = " ".join(texts_of(row.prompt))
    spoken, answered = script(question), script(first)
    seen.note("other_script", place, bool(spoken and answered and spoken != answered))
    if spoken and spoken == answered and place % seen.languages_every == 0 and detector() is not None:
        seen.note("other_language", place, is_in_another_language(first, question))
    if answered:
        seen.scripts[answered] += 1
    if opening := opening_of(row):
        seen.opened(place, opening)


def _say(row: Preference, images: str, seen: Seen) -> None:
    """Note what a row says, so that one that says the opposite is found: the same two answers the other way round, or
    another label."""
    prompt, said = asked(row, images), [digest(*parts(completion)) for completion in row.completions]
    if row.kind == "unpaired":
        seen.said(row.source_row, _key(prompt, said[0]), row.values["label"] == 1.0)
        return
    for better, worse in combinations(said, 2):
        seen.said(row.source_row, _key(prompt, min(better, worse), max(better, worse)), better < worse)


def _key(*digests: bytes) -> bytes:
    return blake2b(b"".join(digests), digest_size=16).digest()
