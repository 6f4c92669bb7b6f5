"""What preparation found and did to the rows: the report that is printed and written to `data.json`."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.data.rows.values import Form
from tether.data.text.marks import UNUSABLE
from tether.data.text.render import Rendered
from tether.files import write_whole
from tether.types import Kind

REPORT = "data.json"
DIGEST_BYTES = 16
# Why rows are dropped, in the order in which it is looked for.
DROPS = {
    "identical": "chosen equal to rejected",
    "empty_completion": "an empty completion",
    "unwritten": "a completion that the chat template does not write",
    "turns": "turns that cannot be told apart",
    "boundary": "no exact prompt boundary",
    "alike": "completions that differ in the rows and not in tokens",
    "unscored": "an answer to score that has no tokens",
    "empty_prompt": "a prompt of no tokens",
    "prompt_too_long": "a prompt that fills max_length",
    "too_long": "more tokens than max_length",
    "image_cut": "an image that truncation would cut",
    "identical_after_truncation": "chosen equal to rejected within max_length",
    "nothing_scored": "no scored token within max_length",
}
_ROOM = "raise max_length (now {max_length})"
# What to do about each of them.
_ADVICE = {
    "identical": "give completions that differ",
    "empty_completion": "give completions that are not empty",
    "unwritten": "set a chat template that writes {lost} (chat_template_path, in a run file `model.chat_template`), or "
    "remove them from the rows",
    "turns": "leave `turns` at `all`, or set a chat template with `{{% generation %}}` marks",
    "boundary": "allow such rows with boundary `split`",
    "alike": "set a chat template, or a tokenizer, that writes what the completions differ in",
    "unscored": "give answers that are not empty, or score further turns",
    "empty_prompt": "give prompts that are not empty, or a tokenizer with a BOS token",
    "prompt_too_long": _ROOM + " or shorten the prompts",
    "too_long": _ROOM + " or shorten the rows",
    "image_cut": _ROOM + " or give smaller images",
    "identical_after_truncation": _ROOM,
    "nothing_scored": _ROOM + ", or score further turns",
}
# From this share of dropped rows on, a run learns from other data than was meant.
_MANY = 0.2
# What the completions of a row are called in the report, and the rows themselves.
PARTS: dict[Kind, tuple[str, ...]] = {
    "pair": ("chosen", "rejected"),
    "ranked": ("completion",),
    "unpaired": ("completion",),
    "completion": ("completion",),
    "prompt_only": (),
}
# What rows are said to be whose own scores do not bear out the order of their completions.
_SCORES = {
    "ranked": "completions have equal `scores` and are ranked in the order that they stand in",
    "pair": "the score of the chosen completion is not above the rejected one's",
}
# What becomes of columns that preparation does not read, where it is something.
_UNUSED = {"prompt_only": "left to rewards"}
_NOUNS: dict[Kind, str] = {
    "pair": "pairs",
    "ranked": "ranked lists",
    "unpaired": "labelled completions",
    "completion": "texts",
    "prompt_only": "prompts",
}
_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
# Markers of common chat templates; a tokenizer's own special tokens are added to them.
_CONTROL_WORDS = ("im_start", "im_end", "endoftext", "begin_of_text", "start_header_id", "end_header_id", "eot_id")
_ROLES = ("system", "user", "assistant", "end")
_MARKERS = (
    *(f"<|{word}|>" for word in (*_CONTROL_WORDS, *_ROLES)),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<SYS>", "</SYS>"),
)
_MARKER_SHAPE = re.compile(r"<[^\s<>]{1,40}>|\[/?[A-Z_]{2,20}\]")


@dataclass(frozen=True)
class Report:
    """What became of the rows of one data set.

    Args:
        name: what the rows are called.
        kind: what the rows were read as.
        rows: how many were read; a pair that is read as two unpaired rows counts as two.
        kept: how many were left to train on.
        dropped: reason to number of rows, for every reason in `DROPS`.
        form: `standard` or `conversational`.
        shared_prompt: the prompt was taken from what chosen and rejected begin with together.
        unused_columns: columns that were not read.
        message_fields: fields of messages, beside role and content, that reached the chat template.
        duplicates: kept rows that repeat an earlier row exactly.
        repeated_prompts: rows of text whose completions all begin with the whole prompt again.
        unevenly_repeated: rows of text of which some completions do and others do not, by which a model can tell them.
        not_borne_out: rows whose own scores do not bear out the order of their completions, see `rows.scores`.
        max_length: limit on the tokens of prompt and completion together; None for no limit.
        truncation_mode: what was kept of longer ones.
        cut_prompts: kept rows whose prompt was cut.
        cut_tokens: tokens that were cut from kept rows, of `prompt` and of `completions`.
        cut_completions: completions that were cut, by position in `PARTS`.
        boundary: the policy for prompts whose ids are not a prefix of the whole's.
        boundaries: kind of boundary to number of rows that came to be tokenised, see `Tokenized`.
        ends_added: completions that got an end-of-turn token because the template writes none.
        unwritten: what rows give and the chat template does not write, to the number of rows.
        other_prompts: rows with a `prompt` of text that is none of the messages which both completions begin with;
            those messages are the prompt.
        marker_rows: rows whose text carries template markers or special tokens.
        markers: marker to number of rows with it.
        tokens: of all kept rows, with each prompt counted once.
        completion_tokens: of all kept completions.
        scored_tokens: of these, the ones that are scored.
        turns: which turns of a completion are scored.
        values: name of a number of the rows to its mean over kept rows.
        lengths: `prompt` and each of `PARTS` to quantiles of their lengths in tokens, after truncation.
        template_hash: of the chat template; None for text.
        fingerprint: content hash of the prepared ids; equal ids have an equal one, on every process and day.
    """

    name: str
    kind: Kind
    rows: int
    kept: int
    dropped: dict[str, int]
    form: Form
    shared_prompt: bool
    unused_columns: tuple[str, ...]
    message_fields: tuple[str, ...]
    duplicates: int
    repeated_prompts: int
    unevenly_repeated: int
    not_borne_out: int
    max_length: int | None
    truncation_mode: str
    cut_prompts: int
    cut_tokens: dict[str, int]
    cut_completions: tuple[int, ...]
    boundary: str
    boundaries: dict[str, int]
    ends_added: int
    unwritten: dict[str, int]
    other_prompts: int
    marker_rows: int
    markers: dict[str, int]
    tokens: int
    completion_tokens: int
    scored_tokens: int
    turns: str
    values: dict[str, float]
    lengths: dict[str, dict[str, int]]
    template_hash: str | None
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        plain = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    def lines(self) -> list[str]:
        """A summary to print: one line on size, then one for each thing a user should know."""
        middle = ", ".join(f"{part} {quantiles['p50']}" for part, quantiles in self.lengths.items())
        head = f"{self.kept:,} of {self.rows:,} {_NOUNS[self.kind]}, {self.tokens:,} tokens (prompts once)"
        head += f"; median length: {middle}"
        dropped = ", ".join(f"{count} with {DROPS[reason]}" for reason, count in self.dropped.items() if count)
        dropped = _limited(dropped, self.kind)
        moved = self.boundaries.get("split", 0), self.boundaries.get("template", 0)
        lost = listed_rows(self.unwritten)
        desirable = self.values.get("label", 0.0)
        whole = "both completions repeat" if self.kind == "pair" else "every completion repeats"
        notes = {
            f"{desirable:.1%} labelled desirable": "label" in self.values,
            f"{self.scored_tokens:,} of {self.completion_tokens:,} completion tokens are scored ({self.turns})": (
                self.scored_tokens != self.completion_tokens
            ),
            f"dropped {dropped}": dropped,
            f"cut {self.cut_prompts} prompts and {sum(self.cut_completions)} completions to {self.max_length} tokens": (
                self.cut_prompts or any(self.cut_completions)
            ),
            f"{self.duplicates} rows repeat another row": self.duplicates,
            f"in {self.repeated_prompts} rows {whole} the prompt": self.repeated_prompts,
            f"in {self.unevenly_repeated} rows one completion repeats the prompt and another does not": (
                self.unevenly_repeated
            ),
            f"in {self.not_borne_out} rows {_SCORES.get(self.kind, _SCORES['pair'])}": self.not_borne_out,
            f"{moved[0]} rows have no exact prompt boundary (policy {self.boundary})": moved[0],
            f"in {moved[1]} rows the template renders the prompt otherwise alone (policy {self.boundary})": moved[1],
            f"{self.ends_added} completions got an end-of-turn token, as the template writes none": self.ends_added,
            f"not written by the chat template: {lost}": lost,
            f"in {self.other_prompts} rows `prompt` is none of the messages, and is not read": self.other_prompts,
            f"{self.marker_rows} rows carry template markers: {', '.join(self.markers)}": self.marker_rows,
            f"{_UNUSED.get(self.kind, 'not read')}: columns {', '.join(self.unused_columns)}": self.unused_columns,
            f"left to the chat template: message fields {', '.join(self.message_fields)}": self.message_fields,
        }
        return [f"{self.name}: {text}" for text, holds in {head: True, **notes}.items() if holds]

    def remark(self) -> str:
        """What to do where a large part of the rows was dropped, by the most frequent reason; empty elsewhere."""
        lost = self.rows - self.kept
        if not self.rows or lost < _MANY * self.rows or not any(self.dropped.values()):
            return ""
        reason = max(DROPS, key=lambda reason: self.dropped.get(reason, 0))
        lacking = " and ".join(what for what in self.unwritten if what in UNUSABLE)
        advice = _ADVICE[reason].format(max_length=self.max_length, lost=lacking or "all of them")
        why = _limited(f"{DROPS[reason]}: {advice}", self.kind)
        return f"{self.name}: {lost / self.rows:.0%} of the rows are not trained on, most with {why}."


@dataclass
class Tally:
    """Counts of one batch of rows, or of several added up."""

    dropped: Counter[str] = field(default_factory=Counter)
    boundaries: Counter[str] = field(default_factory=Counter)
    markers: Counter[str] = field(default_factory=Counter)
    unwritten: Counter[str] = field(default_factory=Counter)
    other_prompts: int = 0
    marker_rows: int = 0
    repeated_prompts: int = 0
    unevenly_repeated: int = 0
    not_borne_out: int = 0
    ends_added: int = 0
    cut_prompts: int = 0
    cut_tokens: Counter[str] = field(default_factory=Counter)
    cut_completions: Counter[int] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Add the counts of `other` to these."""
        for name, value in other.__dict__.items():
            setattr(self, name, getattr(self, name) + value)


def _limited(text: str, kind: Kind) -> str:
    """Words about a limit by the name that it has for such rows."""
    return text.replace("max_length", "max_prompt_length") if kind == "prompt_only" else text


def nothing_left(tally: Tally, name: str, rows: int, max_length: int | None, kind: Kind) -> str:
    """The message for rows of which none can be used: why, and what to do about each reason."""
    dropped = [reason for reason in DROPS if tally.dropped[reason]]
    reasons = ", ".join(f"{tally.dropped[reason]} with {DROPS[reason]}" for reason in dropped)
    if tally.unwritten:
        reasons += f"; the chat template does not write {listed_rows(tally.unwritten)}"
    lost = " and ".join(what for what in tally.unwritten if what in UNUSABLE)
    advice = dict.fromkeys(_ADVICE[reason].format(max_length=max_length, lost=lost) for reason in dropped)
    found = _limited(f"{reasons}. To do: {'; '.join(advice)}", kind)
    return f"{name}: none of the {rows} rows can be used: {found}."


def listed_rows(counts: Mapping[str, int]) -> str:
    """Things with the number of rows that each was found in."""
    return ", ".join(f"{what} (of {count:,} rows)" for what, count in counts.items())


class MarkerFinder:
    """Finds text that a tokenizer would read, or a template would write, as control tokens.

    Args:
        tokenizer: its special tokens are looked for, beside the markers of common templates; None for these alone.

    Example:
        >>> from types import SimpleNamespace
        >>> MarkerFinder(SimpleNamespace(all_special_tokens=["</s>"])).find(["a <b>text</b> [INST]", "end</s>"])
        ['</s>', '[INST]']
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        own = tokenizer.all_special_tokens if tokenizer is not None else ()
        special = [str(token) for token in own if str(token).strip()]
        self.markers = frozenset((*_MARKERS, *special))
        odd = sorted(token for token in special if not _MARKER_SHAPE.fullmatch(token))
        self.pattern = re.compile("|".join([*map(re.escape, odd), _MARKER_SHAPE.pattern]))
        self._firsts = {marker[0] for marker in self.markers}  # most texts have none of them

    def find(self, texts: Iterable[str]) -> list[str]:
        """The distinct markers in some texts, sorted."""
        suspect = (text for text in texts if any(first in text for first in self._firsts))
        return sorted({found for text in suspect for found in self.pattern.findall(text)} & self.markers)


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Quantiles of lengths, each one a length that occurs.

    Example:
        >>> quantiles([3, 1, 2])
        {'min': 1, 'p50': 2, 'p90': 3, 'p99': 3, 'max': 3}
    """
    return quantiles_of_counts(Counter(lengths))


def quantiles_of_counts(counts: Mapping[int, int]) -> dict[str, int]:
    """The same of lengths that are counted: length to how often it occurs.

    Example:
        >>> quantiles_of_counts({3: 1, 1: 2})
        {'min': 1, 'p50': 1, 'p90': 3, 'p99': 3, 'max': 3}
    """
    ordered = sorted(counts)
    up_to = list(accumulate(counts[length] for length in ordered))
    last = up_to[-1] - 1
    return {name: ordered[bisect_right(up_to, round(share * last))] for name, share in _QUANTILES.items()}


def digest(*texts: str) -> bytes:
    """A 16-byte digest of some texts, in order.

    Example:
        >>> digest("ab", "c") == digest("a", "bc")
        False
    """
    whole = blake2b(digest_size=DIGEST_BYTES)
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        whole.update(len(encoded).to_bytes(8, "little") + encoded)
    return whole.digest()


def row_digest(row: Rendered) -> bytes:
    """Digest of what a model sees of a row before truncation, however the row was stored."""
    label = row.values.get("label")
    return digest(row.prompt, *row.texts, *(() if label is None else (str(label),)))


def write_reports(folder: Path, reports: Mapping[str, Any]) -> None:
    """Keep the reports on a run's data sets in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / REPORT, json.dumps(reports, indent=2) + "\n")
