"""The audit of rows before a run: everything about them that is known to spoil training, counted, with row numbers.

Called by `tether data check`, and by a run on a sample of its rows. It needs no model; lengths need a tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.data.audit.collector import Part, Seen, TextRows
from tether.data.audit.language import detector
from tether.data.audit.lengths import Lengths, Limited, Reading, drawing, measured
from tether.data.audit.row_findings import look
from tether.data.prepare.job import paused_collector
from tether.data.prepare.report import MarkerFinder
from tether.data.prepare.workers import held_job, in_order, workers
from tether.data.text.template import text_tokenizer
from tether.data.text.truncate import TruncationMode
from tether.types import Kind

# Batches from which on a process of its own is worth its start.
_BATCHES_OF_A_PROCESS = 10
# What is looked for, in the words in which it is reported; each is a share of the rows.
FINDINGS = {
    "broken": "cannot be read",
    "identical": "completions are equal",
    "empty": "a completion is empty",
    "duplicates": "repeat an earlier row",
    "near_duplicates": "almost repeat an earlier row",
    "contradictions": "contradict an earlier row",
    "not_borne_out": "have scores that do not bear out their order",
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
        unequal_lengths: pairs whose answers have different lengths in characters.
        markers: marker to rows that carry it.
        scripts: script to rows answered in it.
        languages: rows, drawn evenly, whose languages were read.
        opening: the most frequent first words of preferred answers.
        unused_columns: columns that are not read.
        characters: `prompt` and parts to lengths in characters and how often there are such, for histograms.
        lengths: in tokens; None without a tokenizer.
    """

    name: str
    kind: Kind
    rows: int
    total: int
    findings: dict[str, Finding]
    faults: tuple[str, ...]
    length_bias: dict[str, float]
    unequal_lengths: int
    markers: dict[str, int]
    scripts: dict[str, int]
    languages: int
    opening: str
    unused_columns: tuple[str, ...]
    characters: dict[str, Counter[int]] = field(repr=False)
    lengths: Lengths | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; without the lengths of single rows."""
        plain = asdict(self)
        del plain["characters"]
        if self.lengths is not None:
            plain["lengths"] = self.lengths.to_dict()
        plain |= {"faults": list(self.faults), "unused_columns": list(self.unused_columns)}
        return plain


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
    processes: int = 1,
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
        processes: that share the work at most; few rows are looked at by one.

    Returns:
        What was found.

    Raises:
        DataError: columns are missing, so that no row can be read; or there are images and a tokenizer that reads none.
    """
    total = len(rows)
    step = max(total // sample, 1) if sample else 1
    places = range(0, total, step)
    given = rows if step == 1 else rows.select(places)
    own = TextRows.of(given, kind, tokenizer, name)
    others = [TextRows.of(one, kind, tokenizer, name) for one in evaluation]
    finder = MarkerFinder(None if tokenizer is None else text_tokenizer(tokenizer))
    seen, reading = Seen(own, others, places), Reading(given, step) if any(own.images) else None
    every, good, drawn = drawing(len(given), reading), 0, []
    for batch, part in zip(seen.batches(), _parts(_Look(seen, finder), processes), strict=True):
        seen.add(part)
        if batch[0] is None:
            drawn += part.good[-good % every :: every]
            good += len(part.good)
    lengths = None
    if tokenizer is not None and drawn:
        limit = Limited(max_length, cast(TruncationMode, truncation_mode))
        records = [replace(row, source_row=places[row.source_row]) for row, _ in own.whole(drawn)]
        lengths = measured(
            records, good, own.schema, tokenizer, limit, reading, encoder_decoder=encoder_decoder, name=name
        )
        seen.total.add_faults(lengths.unreadable)
    seen.compare()
    return _result(seen, kind, total, lengths, name)


@dataclass(frozen=True)
class _Look:
    """What a process needs to look at a batch."""

    seen: Seen
    finder: MarkerFinder

    @paused_collector()
    def __call__(self, batch: tuple[int | None, int]) -> Part:
        number, start = batch
        if number is not None:
            return self.seen.held(number, start)
        part, found = self.seen.batch(start)
        for row, images in found:
            look(row, images, part, self.finder)
        return part


def _parts(look_at: _Look, processes: int) -> Iterator[Part]:
    """What each batch shows, in their order; looked at by several processes where there are many."""
    batches = look_at.seen.batches()
    wanted = min(processes, len(batches) // _BATCHES_OF_A_PROCESS)
    if wanted < 2:
        yield from map(look_at, batches)
        return
    detector()  # its models, if it is needed at all, are read before the processes part
    with workers(look_at, wanted) as pool:
        yield from in_order(pool, _look_at, batches, 4 * wanted)


def _look_at(batch: tuple[int | None, int]) -> Part:
    return held_job()(batch)


def _result(seen: Seen, kind: Kind, total: int, lengths: Lengths | None, name: str) -> Check:
    rows, shown = len(seen.own.rows), seen.total
    findings = {key: Finding(count, count / rows, tuple(shown.rows[key])) for key, count in shown.counts.items()}
    languages = len(range(0, rows, shown.languages_every))
    if (found := findings.get("other_language")) is not None and languages < rows:
        share = found.count / languages
        findings["other_language"] = replace(found, count=round(share * rows), share=share)
    if lengths is not None and lengths.truncated is not None:
        findings["truncated"] = Finding(round(lengths.truncated * rows), lengths.truncated)
    if lengths is not None and lengths.image_cut is not None:
        findings["image_cut"] = Finding(round(lengths.image_cut * rows), lengths.image_cut)
    bias = {
        f"characters_{part}": sum(size * count for size, count in sizes.items()) / sizes.total()
        for part, sizes in shown.characters.items()
    }
    if shown.unequal:
        bias["longer_wins"] = shown.longer / shown.unequal
    return Check(
        name=name,
        kind=kind,
        rows=rows,
        total=total,
        findings={key: findings[key] for key in FINDINGS if key in findings},
        faults=tuple(shown.faults),
        length_bias=bias,
        unequal_lengths=shown.unequal,
        markers=dict(shown.markers.most_common(10)),
        scripts=dict(shown.scripts.most_common()),
        languages=languages,
        opening=seen.opening,
        unused_columns=seen.own.schema.unused_columns,
        characters=dict(shown.characters),
        lengths=lengths,
    )
