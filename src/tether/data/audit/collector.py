"""What was found so far, in one pass over the rows and then over their groups. Called by `audit`.

What grows with the rows is on disk (see `groups`), but for a few bytes a row: whether it repeats, contradicts, or is in
the evaluation sets.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from tether.data.audit.groups import Groups, first_own, short
from tether.data.audit.language import LANGUAGE_ROWS
from tether.data.audit.near_duplicates import HASHES, NearDuplicates, signed
from tether.data.images.inputs import reads_images, require_processor
from tether.data.images.parts import as_text, has_parts, identity, image_column, missing_file
from tether.data.prepare.report import digest
from tether.data.rows.columns import BATCH_ROWS
from tether.data.rows.schema import Schema, python_rows, record, row_faults, schema_of
from tether.data.rows.scores import not_borne_out, scored_by
from tether.data.rows.values import texts_of
from tether.types import Kind, Messages, Preference

SHOWN_ROWS, _SHOWN_FAULTS = 5, 20
# What rows are compared by: all of one, its prompt, what it says of two answers, how its answer begins.
REMEMBERED = ("whole", "prompts", "said", "openings")


@dataclass(frozen=True)
class TextRows:
    """Rows of text; and of rows with images, what tells each one's from others and what is wrong with them."""

    rows: Dataset
    schema: Schema
    images: list[str]
    faults: list[str]

    @classmethod
    def of(cls, rows: Dataset, kind: Kind, tokenizer: Any, name: str) -> TextRows:
        """Take the images out of rows."""
        if tokenizer is not None:
            require_processor(rows, tokenizer, name=name)
        # A tokenizer of text reads no parts, so a run of it would refuse them.
        with_parts = has_parts(rows) and (tokenizer is None or reads_images(tokenizer))
        if not with_parts and image_column(rows) is None:
            return cls(rows, schema_of(rows, kind, name), [], [])
        text, faults = as_text(rows, getattr(tokenizer, "image_token", None)), [""] * len(rows)
        for place, references in enumerate(text.references):
            lost = missing_file(references)
            faults[place] = text.faults.get(place + 1, f"its image `{lost}` is not there" if lost is not None else "")
        images = list(map(identity, text.references))
        return cls(text.rows, schema_of(text.rows, kind, name), images, faults)

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
        """Some rows, ascending, each with its place and what is wrong with it."""
        if not places:
            return
        near = places[-1] - places[0] < len(places)
        rows = python_rows(
            self.rows if near else self.rows.select(list(places)),
            self.schema.columns,
            places[0] if near else 0,
            places[-1] + 1 if near else len(places),
        )
        for place, row in zip(places, rows, strict=True):
            own = self.faults[place] if self.faults else ""
            yield place, row, [own] if own else row_faults(row, self.schema)

    def whole(self, places: Sequence[int]) -> list[tuple[Preference, str]]:
        """Those of some rows that can be read, and what tells their images."""
        found = [record(row, self.schema, place) for place, row, faults in self.read(places) if not faults]
        return [(one, self.images[one.source_row] if self.images else "") for one in found]


class Part:
    """What the rows of one batch show; batches are looked at apart from each other, and added up in their order.

    Args:
        places: of the rows in their source.
        languages_every: of one in so many rows the languages are read.
    """

    def __init__(self, places: range, languages_every: int) -> None:
        self.places, self.languages_every = places, languages_every
        self.counts: Counter[str] = Counter()
        self.rows: defaultdict[str, list[int]] = defaultdict(list)
        self.faults: list[str] = []
        self.markers: Counter[str] = Counter()
        self.scripts: Counter[str] = Counter()
        self.characters: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.unequal = self.longer = 0
        # Rows that can be read, and what is remembered of each: records of a key and a number.
        self.good: list[int] = []
        self.records: dict[str, list[tuple[int, int]]] = {name: [] for name in REMEMBERED}
        self.signatures = np.empty((0, HASHES), np.uint32)

    def note(self, finding: str, place: int, holds: bool = True) -> None:
        """Note a row, from 0, where something holds or does not."""
        self.counts[finding] += holds
        if holds and len(self.rows[finding]) < SHOWN_ROWS:
            self.rows[finding].append(self.places[place] + 1)

    def opened(self, place: int, opening: str) -> None:
        """Note how the answer of a row begins."""
        self.records["openings"].append((short(digest(opening)), place))

    def said(self, place: int, key: bytes, which: bool) -> None:
        """Note which of two opposite things a row says about something."""
        self.records["said"].append((short(key), 2 * place + which))

    def remember(self, found: Sequence[tuple[Preference, str]], first: int, *, prompts: bool) -> None:
        """What is compared with other rows: of the whole row, of its prompt where that is wanted, and of its text."""
        self.good = [row.source_row + first for row, _ in found]
        self.records["whole"] = [(short(_digest(row, images)), row.source_row + first) for row, images in found]
        if prompts:
            self.records["prompts"] = [(short(asked(row, images)), row.source_row + first) for row, images in found]
        self.signatures = signed([(_text(row), images) for row, images in found])

    def add_faults(self, faults: Sequence[str]) -> None:
        """Note what is wrong with rows, in words."""
        self.faults += faults[: max(_SHOWN_FAULTS - len(self.faults), 0)]


class Seen:
    """What was found so far, of all batches.

    Args:
        own: the rows that are looked at.
        others: the evaluation sets.
        places: of the rows in their source.

    `total` is what batches show by themselves.
    """

    def __init__(self, own: TextRows, others: Sequence[TextRows], places: range) -> None:
        self.own, self.others = own, others
        self.total = Part(places, max(-(-len(own.rows) // LANGUAGE_ROWS), 1))
        self.opening = ""
        self._ends = np.cumsum([0, *(len(one.rows) for one in others)]).tolist()
        expected = len(own.rows) + self._ends[-1]
        self._records = {name: Groups(expected) for name in REMEMBERED}
        self._near = NearDuplicates(expected)

    def batches(self) -> list[tuple[int | None, int]]:
        """What is to be read, in this order: the number of an evaluation set, or None for the rows; and where."""
        held = [(n, start) for n, one in enumerate(self.others) for start in range(0, len(one.rows), BATCH_ROWS)]
        return [*held, *((None, start) for start in range(0, len(self.own.rows), BATCH_ROWS))]

    def held(self, number: int, start: int) -> Part:
        """Rows of an evaluation set, which have numbers below 0 among all."""
        part, one = Part(self.total.places, 1), self.others[number]
        some = one.whole(range(start, min(start + BATCH_ROWS, len(one.rows))))
        part.remember(some, self._ends[number] - self._ends[-1], prompts=True)
        return part

    def batch(self, start: int) -> tuple[Part, list[tuple[Preference, str]]]:
        """The rows from `start` on: those that can be read, and what is said of the others."""
        part, found = Part(self.total.places, self.total.languages_every), []
        stop = min(start + BATCH_ROWS, len(self.own.rows))
        if scored_by(self.own.schema):
            for place, holds in enumerate(not_borne_out(self.own.rows, self.own.schema, start, stop), start):
                part.note("not_borne_out", place, holds)
        for place, row, faults in self.own.read(range(start, stop)):
            part.note("broken", place, bool(faults))
            part.add_faults([f"row {part.places[place] + 1}: {fault}" for fault in faults])
            if not faults:
                found.append((record(row, self.own.schema, place), self.own.images[place] if self.own.images else ""))
        part.remember(found, 0, prompts=bool(self.others))
        return part, found

    def add(self, part: Part) -> None:
        """Add what a batch shows; they come in the order of `batches`."""
        total = self.total
        for name in ("counts", "markers", "scripts"):
            getattr(total, name).update(getattr(part, name))
        for finding, rows in part.rows.items():
            total.rows[finding] += rows[: SHOWN_ROWS - len(total.rows[finding])]
        for which, sizes in part.characters.items():
            total.characters[which].update(sizes)
        total.unequal, total.longer = total.unequal + part.unequal, total.longer + part.longer
        total.add_faults(part.faults)
        for name, records in part.records.items():
            if records:
                self._records[name].add(*zip(*records, strict=True))
        if part.good:
            self._near.add_signed(part.good, part.signatures)

    def _texts(self, numbers: Sequence[int]) -> list[tuple[str, str]]:
        """Texts of rows that can be read, by ascending numbers."""
        found = []
        for begin, one in zip(self._ends, self.others, strict=False):
            first = begin - self._ends[-1]
            found += one.whole([n - first for n in numbers if first <= n < first + len(one.rows)])
        found += self.own.whole([n for n in numbers if n >= 0])
        return [(_text(row), images) for row, images in found]

    def compare(self) -> None:
        """Note what rows show together, after the last one."""
        count, total = len(self.own.rows), self.total
        repeated, inside, prompts, opposed = (np.zeros(count, bool) for _ in range(4))
        for records, starts in self._records["whole"].pieces():
            rows, first = records["row"], first_own(records, starts)
            repeated[rows[np.arange(len(rows)) > first]] = True
            inside[rows[(rows >= 0) & (rows[starts] < 0)]] = True
        for records, starts in self._records["prompts"].pieces():
            rows = records["row"]
            prompts[rows[(rows >= 0) & (rows[starts] < 0)]] = True
        for records, starts in self._records["said"].pieces():
            rows, which = records["row"] >> 1, records["row"] & 1
            opposed[rows[which != which[starts]]] = True
        near, near_others = self._near.alike(self._texts, count, repeated)
        found = {"duplicates": repeated, "near_duplicates": near, "contradictions": opposed}
        if self.others:
            found |= {"in_evaluation": inside, "prompts_in_evaluation": prompts}
            found["near_evaluation"] = near_others & ~inside
        readable = total.counts["broken"] < count
        for finding, holds in found.items():
            if readable and (finding != "contradictions" or finding in total.counts):
                total.counts[finding] += int(holds.sum())
                total.rows[finding] = [total.places[n] + 1 for n in np.flatnonzero(holds)[:SHOWN_ROWS].tolist()]
        self._count_openings()

    def _count_openings(self) -> None:
        """The most frequent opening; of several, that of the earliest row."""
        most, found, total = 1, np.empty(0, np.int64), self.total
        for records, starts in self._records["openings"].pieces():
            places, counts = np.unique(starts, return_counts=True)
            count = int(counts.max(initial=0))
            if count < max(most, 2):
                continue
            place = min(places[counts == count].tolist(), key=lambda start: records["row"][start])
            rows = records["row"][place : place + min(count, SHOWN_ROWS)]
            if count > most or rows[0] < found[0]:
                most, found = count, rows
        if len(found):
            [(row, _)] = self.own.whole(found[:1].tolist())
            self.opening = opening_of(row)
            total.counts["openings"], total.rows["openings"] = most, [total.places[n] + 1 for n in found.tolist()]


def opening_of(row: Preference) -> str:
    """The first words of the first answer."""
    return " ".join(" ".join(texts_of(row.completions[0])).split(None, 4)[:4])


def parts(value: str | Messages) -> list[str]:
    """The texts of a prompt or completion with the roles of their turns."""
    return [value] if isinstance(value, str) else [part for m in value for part in (m["role"], m["content"])]


def asked(row: Preference, images: str) -> bytes:
    """Digest of a prompt, of which its images are a part."""
    return digest(images, *parts(row.prompt))


def _digest(row: Preference, images: str) -> bytes:
    label = [str(row.values["label"])] if "label" in row.values else []
    answers = (part for completion in row.completions for part in parts(completion))
    return digest(images, *parts(row.prompt), *answers, *label)


def _text(row: Preference) -> str:
    return " ".join(part for value in (row.prompt, *row.completions) for part in texts_of(value))
