"""The audit of rows before a run: everything about them that is known to spoil training, counted, with row numbers.

Called by `tether data check`, and by a run on a sample of its rows. It needs no model; lengths need a tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.data.audit.language import detector, is_in_another_language, is_odd, is_refusal, script
from tether.data.audit.lengths import Lengths, Limited, Reading, drawing, measured
from tether.data.audit.near_duplicates import NearDuplicates
from tether.data.images.inputs import reads_images, require_processor
from tether.data.images.parts import as_text, has_parts, identity, image_column, missing_file
from tether.data.prepare.report import MarkerFinder, digest
from tether.data.rows.schema import Schema, python_rows, record, row_faults, schema_of
from tether.data.rows.values import is_blank, texts_of
from tether.data.text.template import text_tokenizer
from tether.data.text.truncate import TruncationMode
from tether.types import Kind, Messages, Preference

# What is looked for, in the words in which it is reported; each is a share of the rows.
FINDINGS = {
    "broken": "cannot be read",
    "identical": "completions are equal",
    "empty": "a completion is empty",
    "duplicates": "repeat an earlier row",
    "near_duplicates": "almost repeat an earlier row",
    "contradictions": "contradict an earlier row",
    "in_evaluation": "are in the evaluation set",
    "near_evaluation": "are almost in the evaluation set",
    "prompts_in_evaluation": "share a prompt with the evaluation set",
    "markers": "carry template markers",
    "odd_roles": "have turns in an odd order",
    "other_script": "are answered in another script",
    "other_language": "are answered in another language",
    "refusals": "prefer a refusal",
    "refusals_rejected": "reject a refusal",
    "openings": "share the most frequent opening",
    "longer_chosen": "prefer the longer answer",
    "truncated": "would be cut",
    "image_cut": "would lose a part of an image, so they are dropped",
}
SHOWN_ROWS = 5


@dataclass(frozen=True)
class Finding:
    """How many rows show one thing.

    Args:
        count: rows.
        share: of all rows.
        rows: the first ones, counted from 1.
    """

    count: int
    share: float
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Check:
    """All that was found.

    Args:
        name: of the rows.
        kind: what they were read as.
        rows: how many were looked at.
        total: how many there are.
        findings: name of a finding, see `FINDINGS`, to what was found; those that do not apply are left out.
        faults: what is wrong with the first broken rows, in words.
        length_bias: `longer_wins`, the accuracy of preferring the longer completion, and mean characters of each.
        markers: marker to rows that carry it.
        scripts: script to rows answered in it.
        opening: the most frequent first words of preferred answers.
        characters: `prompt` and parts to their lengths in characters, for histograms.
        lengths: in tokens; None without a tokenizer.
    """

    name: str
    kind: Kind
    rows: int
    total: int
    findings: dict[str, Finding]
    faults: tuple[str, ...]
    length_bias: dict[str, float]
    markers: dict[str, int]
    scripts: dict[str, int]
    opening: str
    characters: dict[str, list[int]] = field(repr=False)
    lengths: Lengths | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; without the lengths of single rows."""
        plain = asdict(self)
        del plain["characters"]
        if self.lengths is not None:
            plain["lengths"] = self.lengths.to_dict()
        plain["faults"] = list(self.faults)
        return plain


@dataclass
class _Seen:
    """What was found so far, in one pass over the rows."""

    rows: dict[str, list[int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    digests: set[bytes] = field(default_factory=set)
    orders: dict[bytes, bytes] = field(default_factory=dict)
    prompts: list[tuple[int, bytes]] = field(default_factory=list)
    markers: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    openings: dict[str, list[int]] = field(default_factory=dict)
    characters: dict[str, list[int]] = field(default_factory=dict)
    near: NearDuplicates = field(default_factory=NearDuplicates)

    def note(self, finding: str, number: int, holds: bool = True) -> None:
        """Note a row where something holds."""
        rows = self.rows.setdefault(finding, [])
        if holds:
            rows.append(number)


def check(
    rows: Dataset,
    *,
    kind: Kind = "pair",
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    max_length: int | None = None,
    truncation_mode: TruncationMode | str = "keep_start",
    encoder_decoder: bool = False,
    evaluation: Sequence[Dataset] = (),
    sample: int | None = None,
    name: str = "data",
) -> Check:
    """Look at rows for what is known to spoil training.

    Args:
        rows: as `load_rows` returns them.
        kind: what they are to be read as.
        tokenizer: for lengths in tokens, and for its own special tokens among the markers; None leaves lengths out. A
            processor reads the images of the rows that are measured, and no others are.
        max_length: the run's limit in tokens, for `truncated`.
        truncation_mode: the run's, for the same.
        encoder_decoder: the model reads prompts in an encoder.
        evaluation: sets of rows that must not be among these.
        sample: look at no more than about this many rows, drawn evenly; None looks at all.
        name: what to call the rows.

    Returns:
        What was found.

    Raises:
        DataError: columns are missing, so that no row can be read; or there are images and a tokenizer that reads none.
    """
    total = len(rows)
    step = max(total // sample, 1) if sample else 1
    places = range(0, total, step)
    given = rows if step == 1 else rows.select(places)
    looked = _Looked.of(given, tokenizer, name)
    schema = schema_of(looked.rows, kind, name)
    finder = MarkerFinder(None if tokenizer is None else text_tokenizer(tokenizer))
    held = _Held.of(evaluation, kind, tokenizer, name) if evaluation else None
    seen, reading = _Seen(), Reading(given, step) if any(looked.images) else None
    every, good, drawn = drawing(len(given), reading), 0, []
    for place, row, images, fault in zip(places, python_rows(looked.rows, schema.columns), *looked.beside, strict=True):
        number = place + 1
        faults = [fault] if fault else row_faults(row, schema)
        seen.note("broken", number, bool(faults))
        if faults:
            seen.faults += [f"row {number}: {fault}" for fault in faults]
            continue
        found = record(row, schema, place)
        _look(found, images, number, seen, finder, held)
        if good % every == 0:  # the others are forgotten: a check holds no whole set in memory
            drawn.append(found)
        good += 1
    lengths = None
    if tokenizer is not None and drawn:
        limit = Limited(max_length, cast(TruncationMode, truncation_mode))
        lengths = measured(drawn, good, schema, tokenizer, limit, reading, encoder_decoder=encoder_decoder, name=name)
        seen.faults += lengths.unreadable
    return _result(seen, schema, kind, len(given), total, lengths, name)


@dataclass(frozen=True)
class _Looked:
    """Rows of text, and for each row what tells its images from others and what is wrong with them."""

    rows: Dataset
    images: list[str]
    faults: list[str]

    @property
    def beside(self) -> tuple[list[str], list[str]]:
        return self.images, self.faults

    @classmethod
    def of(cls, rows: Dataset, tokenizer: Any, name: str) -> _Looked:
        if tokenizer is not None:
            require_processor(rows, tokenizer, name=name)
        nothing = [""] * len(rows)
        # A tokenizer of text reads no parts, so a run of it would refuse them.
        parts = has_parts(rows) and (tokenizer is None or reads_images(tokenizer))
        if not parts and image_column(rows) is None:
            return cls(rows, nothing, nothing)
        text, faults = as_text(rows, getattr(tokenizer, "image_token", None)), nothing.copy()
        for place, references in enumerate(text.references):
            lost = missing_file(references)
            faults[place] = text.faults.get(place + 1, f"its image `{lost}` is not there" if lost is not None else "")
        return cls(text.rows, list(map(identity, text.references)), faults)


@dataclass(frozen=True)
class _Held:
    """An evaluation set, to be asked what of it is elsewhere."""

    rows: frozenset[bytes]
    prompts: frozenset[bytes]
    near: NearDuplicates

    @classmethod
    def of(cls, sets: Sequence[Dataset], kind: Kind, tokenizer: Any, name: str) -> _Held:
        near, whole, prompts = NearDuplicates(), set(), set()
        for rows in sets:
            looked = _Looked.of(rows, tokenizer, name)
            schema = schema_of(looked.rows, kind, name)
            for row, images, fault in zip(python_rows(looked.rows, schema.columns), *looked.beside, strict=True):
                if not fault and not row_faults(row, schema):
                    found = record(row, schema, 0)
                    near.add(_text(found), images)
                    whole.add(_digest(found, images))
                    prompts.add(_asked(found, images))
        return cls(frozenset(whole), frozenset(prompts), near)


def _look(row: Preference, images: str, number: int, seen: _Seen, finder: MarkerFinder, held: _Held | None) -> None:
    own, prompt = _digest(row, images), _asked(row, images)
    repeated = own in seen.digests
    seen.digests.add(own)
    text = _text(row)
    seen.note("duplicates", number, repeated)
    seen.note("near_duplicates", number, seen.near.add(text, images) is not None and not repeated)
    if held is not None:
        inside = own in held.rows
        seen.note("in_evaluation", number, inside)
        seen.note("prompts_in_evaluation", number, prompt in held.prompts)
        seen.note("near_evaluation", number, not inside and held.near.find(text, images) is not None)
    if row.completions:
        alike = any(one in row.completions[:k] for k, one in enumerate(row.completions))
        seen.note("empty", number, any(map(is_blank, row.completions)))
        if len(row.completions) > 1:
            seen.note("identical", number, alike)
        if row.kind in ("pair", "ranked", "unpaired"):
            seen.note("contradictions", number, not alike and _contradicts(row, prompt, seen))
        _look_at_answers(row, number, seen)
    texts = [part for value in (row.prompt, *row.completions) for part in texts_of(value)]
    found = finder.find(texts)
    seen.markers.update(found)
    seen.note("markers", number, bool(found))
    if isinstance(row.prompt, list):
        seen.note("odd_roles", number, any(is_odd([*row.prompt, *cast(Messages, c)]) for c in row.completions or ([],)))
    seen.characters.setdefault("prompt", []).append(sum(map(len, texts_of(row.prompt))))


def _look_at_answers(row: Preference, number: int, seen: _Seen) -> None:
    answers = [" ".join(texts_of(completion)) for completion in row.completions]
    sizes = list(map(len, answers))
    first = answers[0]
    desirable = row.values.get("label", 1.0) == 1.0
    names = ("chosen", "rejected") if row.kind in ("pair", "ranked") else ("completion",)
    for part, size in zip(names, (sizes[0], sizes[-1]), strict=False):
        seen.characters.setdefault(part, []).append(size)
    if len(names) > 1:
        seen.note("longer_chosen", number, sizes[0] > sizes[-1])
        seen.note("refusals_rejected", number, is_refusal(answers[-1]))
    seen.note("refusals", number, desirable and is_refusal(first))
    question = " ".join(texts_of(row.prompt))
    asked, answered = script(question), script(first)
    seen.note("other_script", number, bool(asked and answered and asked != answered))
    if asked and asked == answered and detector() is not None:
        seen.note("other_language", number, is_in_another_language(first, question))
    if answered:
        seen.scripts[answered] += 1
    opening = " ".join(first.split(None, 4)[:4])
    if opening:
        seen.openings.setdefault(opening, []).append(number)


def _contradicts(row: Preference, prompt: bytes, seen: _Seen) -> bool:
    """Whether an earlier row says the opposite: the same two answers the other way round, or another label."""
    said = [digest(*_parts(completion)) for completion in row.completions]
    if row.kind == "unpaired":
        label = str(row.values["label"]).encode()
        return seen.orders.setdefault(prompt + said[0], label) != label
    opposed = False
    for better, worse in combinations(said, 2):
        key, order = prompt + min(better, worse) + max(better, worse), better
        opposed |= seen.orders.setdefault(key, order) != order
    return opposed


def _parts(value: str | Messages) -> list[str]:
    return [value] if isinstance(value, str) else [part for m in value for part in (m["role"], m["content"])]


def _asked(row: Preference, images: str) -> bytes:
    """Digest of a prompt, of which its images are a part."""
    return digest(images, *_parts(row.prompt))


def _digest(row: Preference, images: str) -> bytes:
    label = [str(row.values["label"])] if "label" in row.values else []
    answers = (part for completion in row.completions for part in _parts(completion))
    return digest(images, *_parts(row.prompt), *answers, *label)


def _text(row: Preference) -> str:
    return " ".join(part for value in (row.prompt, *row.completions) for part in texts_of(value))


def _result(
    seen: _Seen, schema: Schema, kind: Kind, rows: int, total: int, lengths: Lengths | None, name: str
) -> Check:
    opening, places = max(seen.openings.items(), key=lambda item: len(item[1]), default=("", []))
    numbers: Iterator[tuple[str, Sequence[int]]] = iter(
        {**seen.rows, **({"openings": places} if len(places) > 1 else {})}.items()
    )
    findings = {key: Finding(len(found), len(found) / rows, tuple(found[:SHOWN_ROWS])) for key, found in numbers}
    if lengths is not None and lengths.truncated is not None:
        findings["truncated"] = Finding(round(lengths.truncated * rows), lengths.truncated)
    if lengths is not None and lengths.image_cut is not None:
        findings["image_cut"] = Finding(round(lengths.image_cut * rows), lengths.image_cut)
    sizes = {part: np.array(values) for part, values in seen.characters.items()}
    bias = {f"characters_{part}": float(values.mean()) for part, values in sizes.items()}
    if "rejected" in sizes and (unequal := int((sizes["chosen"] != sizes["rejected"]).sum())):
        bias["longer_wins"] = float((sizes["chosen"] > sizes["rejected"]).sum() / unequal)
    return Check(
        name=name,
        kind=kind,
        rows=rows,
        total=total,
        findings={key: findings[key] for key in FINDINGS if key in findings},
        faults=tuple(seen.faults[:20]),
        length_bias=bias,
        markers=dict(seen.markers.most_common(10)),
        scripts=dict(seen.scripts.most_common()),
        opening=opening if len(places) > 1 else "",
        characters=seen.characters,
        lengths=lengths,
    )
