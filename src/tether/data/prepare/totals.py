"""What preparation found, added up batch by batch, so that a report can be made at any time. Called by `prepare` and
`stream`."""

from __future__ import annotations

from collections import Counter, defaultdict
from hashlib import blake2b

import numpy as np

from tether.data.prepare.job import Batch, Job
from tether.data.prepare.report import DROPS, PARTS, Report, Tally, quantiles_of_counts
from tether.data.prepare.table import fingerprint_of, lengths_of
from tether.data.rows.schema import VALUES
from tether.data.text.template import template_hash


class Totals:
    """Counts of the batches of one set. What it holds does not grow with the rows but for `remembered` of them.

    Args:
        remembered: among how many rows, from the first, repeated rows are counted; None: among all.
    """

    def __init__(self, remembered: int | None = None) -> None:
        self.rows = self.kept = self.duplicates = 0
        self.tally = Tally()
        self._lengths: dict[str, Counter[int]] = defaultdict(Counter)
        self._scored = 0
        self._sums: Counter[str] = Counter()
        self._seen: set[int] = set()
        self._remembered = remembered
        # In the order in which they came; a set would have another one in every process.
        self._unused: dict[str, None] = {}
        self._fields: set[str] = set()
        self._chain = blake2b(digest_size=16)

    def add(self, batch: Batch, job: Job) -> None:
        """Add a batch that a job made."""
        table = batch.table
        self.rows += batch.rows
        self.kept += table.num_rows
        self.tally.add(batch.tally)
        self._unused |= dict.fromkeys(job.schema.unused_columns)
        self._fields |= set(job.schema.message_fields)
        self._count_repeated(batch.digests[0])
        if not table.num_rows:
            return
        self._chain.update(fingerprint_of(table).encode())
        prompts, completions = lengths_of(table)
        self._lengths["prompt"].update(prompts.tolist())
        names = PARTS[job.options.kind]
        for lengths in completions:
            for place, length in enumerate(lengths):
                self._lengths[names[min(place, len(names) - 1)]][length] += 1
        if job.options.turns != "all":
            masks = table["scored"].combine_chunks().flatten().flatten()
            self._scored += int(np.sum(masks.to_numpy(zero_copy_only=False)))
        for name in VALUES:
            if name in table.column_names:
                self._sums[name] += float(np.sum(table[name].to_numpy(), dtype=np.float64))  # type: ignore[assignment]

    def _count_repeated(self, digests: list[bytes]) -> None:
        for digest in digests:
            short = int.from_bytes(digest[:8], "little")
            if short in self._seen:
                self.duplicates += 1
            elif self._remembered is None or len(self._seen) < self._remembered:
                self._seen.add(short)

    def report(self, job: Job, fingerprint: str | None = None) -> Report:
        """What is known so far.

        Args:
            job: the one of the first rows.
            fingerprint: of all rows; None: what the fingerprints of the batches make together.
        """
        tally, options, parts = self.tally, job.options, PARTS[job.options.kind]
        tokens = {part: sum(length * count for length, count in self._lengths[part].items()) for part in parts}
        completion_tokens = sum(tokens.values())
        prompt_tokens = sum(length * count for length, count in self._lengths["prompt"].items())
        return Report(
            name=job.name,
            kind=options.kind,
            rows=self.rows,
            kept=self.kept,
            dropped={reason: tally.dropped[reason] for reason in DROPS},
            form=job.schema.form,
            shared_prompt=job.schema.shared_prompt,
            unused_columns=tuple(self._unused),
            message_fields=tuple(sorted(self._fields)),
            duplicates=self.duplicates,
            repeated_prompts=tally.repeated_prompts,
            unevenly_repeated=tally.unevenly_repeated,
            not_borne_out=tally.not_borne_out,
            max_length=options.max_length,
            truncation_mode=options.mode,
            cut_prompts=tally.cut_prompts,
            cut_tokens={part: tally.cut_tokens[part] for part in ("prompt", "completions")},
            cut_completions=tuple(tally.cut_completions[k] for k in range(len(parts))),
            boundary=options.boundary,
            boundaries=dict(sorted(tally.boundaries.items())),
            ends_added=tally.ends_added,
            other_prompts=tally.other_prompts,
            unwritten=dict(sorted(tally.unwritten.items())),
            marker_rows=tally.marker_rows,
            markers=dict(sorted(tally.markers.items())),
            tokens=prompt_tokens + completion_tokens,
            completion_tokens=completion_tokens,
            scored_tokens=completion_tokens if options.turns == "all" else self._scored,
            turns=options.turns,
            values={name: self._sums[name] / self.kept for name in VALUES if name in self._sums},
            lengths={part: quantiles_of_counts(self._lengths[part]) for part in ("prompt", *parts)},
            template_hash=None if job.template is None else template_hash(job.template),
            fingerprint=fingerprint or self._chain.hexdigest(),
        )
