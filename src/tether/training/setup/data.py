"""The data sets of a run: prepared before any weights load, reported, and compared with each other."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.compat.datasets import arrow_table
from tether.compute.threads import granted_cores
from tether.data import (
    Overlap,
    Prepared,
    Report,
    chat_template,
    is_origin,
    is_split,
    load_rows,
    overlap,
    prepare_cached,
    split_rows,
)
from tether.data.audit.audit import FINDINGS, check
from tether.data.audit.limits import check_sets, passed
from tether.data.prepare.job import Options
from tether.data.prepare.stream import Arrange, PreparedStream
from tether.data.sources.load import plain_rows
from tether.data.sources.stream import RowStream, is_streamed
from tether.data.text.template import text_tokenizer
from tether.errors import ConfigError, DataError
from tether.models.gguf import cache_root
from tether.training.config import PreferenceConfig
from tether.training.setup.limits import Check
from tether.training.source import RowSource, Source, StreamSource

logger = logging.getLogger("tether")
CHAT_TEMPLATE = "chat_template.jinja"
_AUDITED_ROWS = 2000
# Findings of the sample that are worth a line, above this share; the others are in the run folder.
_WARNED = ("contradictions", "near_duplicates", "odd_roles", "other_script", "refusals")
_TELLING = 0.05
# A length by which so many pairs are told apart is a shortcut; of fewer pairs than this a share says little.
_ONE_SIDED = 0.9
_ENOUGH = 20
Rows = Dataset | IterableDataset | list[dict[str, Any]] | Mapping[str, Any] | str | Path | list[str]


def distinct_rows(rows: Dataset, name: str) -> Dataset:
    """Rows without those that are exactly an earlier one, and a line that says how many these were."""
    seen: dict[bytes, int] = {}
    for place, row in enumerate(plain_rows(rows)):
        seen.setdefault(sha256(json.dumps(row, default=str, sort_keys=True).encode()).digest(), place)
    if len(seen) < len(rows):
        logger.info(f"{name}: {len(rows) - len(seen):,} rows are exactly an earlier one, and are left out")
    return rows.select(list(seen.values()))


def _has_template(processing: PreTrainedTokenizerBase | ProcessorMixin) -> bool:
    return bool(text_tokenizer(processing).chat_template)


@dataclass
class RunData:
    """Prepares rows for one run and keeps the reports.

    Args:
        tokenizer: the policy's, or its processor.
        args: lengths, truncation, boundary policy.
        arrange: what is done to prepared rows before they are packed.
        encoder_decoder: whether the policy reads prompts in an encoder.
        check: refuses prepared rows that the model cannot compute, by the name of their set and their table.
        arrange_chunks: the same as `arrange` for a stream: called once a pass, gives what changes its chunks.
        reports: name of a set to its report, for `data.json`.
        evaluated: name of an evaluation set to digests of its rows and of its prompts, where training is streamed.
        sets: prepared sets, each with the rows that it was made of.
    """

    tokenizer: PreTrainedTokenizerBase | ProcessorMixin
    args: PreferenceConfig
    arrange: Callable[[Prepared], Prepared] = field(default=lambda prepared: prepared)
    encoder_decoder: bool = False
    check: Check = field(default=lambda name, table: None)
    arrange_chunks: Callable[[], Arrange] = field(default=lambda: lambda table: table)
    reports: dict[str, Any] = field(default_factory=dict)
    evaluated: dict[str, tuple[set[bytes], set[bytes]]] = field(default_factory=dict)
    _loaded: dict[str, Dataset] = field(default_factory=dict, repr=False)
    sets: list[tuple[Dataset, Dataset]] = field(default_factory=list)

    def rows_of(self, prepared: Any) -> Dataset:
        """The rows that a prepared set was made of, whose numbers its column `source_row` has."""
        return next(rows for dataset, rows in self.sets if dataset is prepared)

    def prepare(self, name: str, rows: Rows) -> Prepared:
        """Prepare one set, or take it from the cache; see `tether.data.prepare.prepare`."""
        data = load_rows(rows, kind=self.args.kind, name=name)
        if self.args.deduplicate and name == "train":
            data = distinct_rows(data, name)
        if is_streamed(rows):
            logger.info(f"{name}: a streamed set, read whole: {len(data):,} rows")
        prepared = prepare_cached(
            data,
            self.tokenizer,
            folder=cache_folder(self.args.dataset_cache),
            max_length=self.args.max_length,
            kind=self.args.kind,
            turns=self.args.turns,
            truncation_mode=self.args.truncation_mode,
            boundary=self.args.prompt_boundary,
            num_proc=self.args.dataset_num_proc,
            encoder_decoder=self.encoder_decoder,
            **{name: value for name, value in self._of_conversations().items() if value is not None},
            name=name,
        )
        prepared = self.arrange(prepared)  # rows may be longer by it, as KTO's get another row's completion
        self.check(name, arrow_table(prepared.dataset))
        self.sets.append((prepared.dataset, data))
        self.reports[name] = {**prepared.report.to_dict(), "lines": prepared.report.lines()}
        self._loaded[name] = data
        if self.args.process_index == 0:  # the one that writes data.json; the others go on, and wait for nothing here
            self.reports[name]["audit"] = self._audit(name, data)
        for line in prepared.report.lines():
            logger.info(line)
        if prepared.report.form == "standard" and len(self.reports) == 1 and _has_template(self.tokenizer):
            logger.info(
                f"{name}: the rows are text and are trained on as they are; the model's chat template writes lists of "
                "messages alone, which a `format` such as chatml.default makes of prompts and answers"
            )
        if remark := prepared.report.remark():
            logger.warning(remark)
        return prepared

    def _of_conversations(self) -> dict[str, Any]:
        """Options that are a part of an entry of the cache only where they are given."""
        return {"system": self.args.default_system, "template_arguments": self.args.chat_template_kwargs or None}

    def prepare_stream(self, name: str, rows: Rows) -> PreparedStream:
        """Begin a set that is prepared while it is trained on, and say what was done to its first rows."""
        args = self.args
        options = Options(
            args.max_length,
            args.kind,
            args.turns,
            cast(Any, args.truncation_mode),
            cast(Any, args.prompt_boundary),
            args.dataset_num_proc,
            self.encoder_decoder,
            **self._of_conversations(),
        )
        source = RowStream(cast(Any, rows), args.kind, name)

        def arranged() -> Arrange:
            arrange = self.arrange_chunks()

            def checked(table: pa.Table) -> pa.Table:
                table = arrange(table)
                self.check(name, table)
                return table

            return checked

        stream = PreparedStream(source, self.tokenizer, options, arrange=arranged)
        self.reports[name] = {**stream.report.to_dict(), "lines": stream.report.lines()}
        self._loaded[name] = stream.sample
        if args.process_index == 0:  # see `prepare`
            self.reports[name]["audit"] = self._audit(name, stream.sample)
        logger.info(f"{name}: streamed; of the first {stream.report.rows:,} rows:")
        for line in stream.report.lines():
            logger.info(line)
        return stream

    def _keep_template(self, report: Report) -> None:
        """The chat template goes into the run folder: the tokenizer that it came with may change."""
        if report.template_hash is not None and self.args.process_index == 0:
            folder = Path(cast(str, self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CHAT_TEMPLATE).write_text(chat_template(self.tokenizer), encoding="utf-8")

    def _audit(self, name: str, rows: Dataset) -> dict[str, Any]:
        """What a look at a sample of the rows found; `tether data check` looks at all of them."""
        found = check(rows, kind=self.args.kind, sample=_AUDITED_ROWS, name=name)
        for finding, one in found.findings.items():
            if one.share > _TELLING and finding in _WARNED:
                logger.warning(f"{name}: {one.share:.0%} of {found.rows} sampled rows {FINDINGS[finding]}")
        longer = found.length_bias.get("longer_wins", 0.5)
        unequal = found.unequal_lengths
        if unequal >= max(_ENOUGH, found.rows / 2) and not 1 - _ONE_SIDED <= longer <= _ONE_SIDED:
            which = "longer" if longer > 0.5 else "shorter"
            logger.warning(
                f"{name}: in {max(longer, 1 - longer):.0%} of {unequal} sampled pairs of unequal lengths the {which} "
                "completion is the chosen one, so that length alone tells them apart. Balance the lengths, or watch "
                "those of what the model writes."
            )
        shares = {finding: one.share for finding, one in found.findings.items()}
        return {"sampled_rows": found.rows, **shares, **found.length_bias}

    def prepare_all(self, train: Rows, evaluation: Rows | Mapping[str, Rows] | None) -> tuple[Source, Any]:
        """Prepare the training set and the evaluation sets, and count training rows inside each of the latter.

        Returns:
            The training rows, and the evaluation set, a dictionary of them, or None.
        """
        # Prompts are drawn from all rows: of these a stream is read whole.
        streamed = self.args.stream_dataset or (is_streamed(train) and self.args.kind != "prompt_only")
        if streamed:
            self.args.require_streamable()
            _refuse_split(evaluation)
        elif is_split(evaluation):
            asked, kind = cast(Mapping[str, Any], evaluation), self.args.kind
            train, evaluation = split_rows(load_rows(train, kind=kind, name="train"), asked, kind=kind)
        training = self.prepare_stream("train", train) if streamed else self.prepare("train", train)
        source = StreamSource(training) if isinstance(training, PreparedStream) else RowSource(training.dataset)
        if not streamed and self.args.kind != "prompt_only":
            self._require_a_batch(len(source.known))
        self._keep_template(training.report)
        if evaluation is None:
            self._hold_to_limits(streamed=streamed)
            return source, None
        named = isinstance(evaluation, Mapping) and not is_origin(evaluation)
        sets = cast(Mapping[str, Rows], evaluation if named else {"": evaluation})
        parts = {f"eval_{name}" if named else "eval": rows for name, rows in sets.items()}
        prepared = {name: self.prepare(name, rows) for name, rows in parts.items()}
        self._hold_to_limits(streamed=streamed)
        for name, part in prepared.items():
            if isinstance(training, PreparedStream):
                self.evaluated[name] = set(part.row_digests), set(part.prompt_digests)
                continue
            shared = overlap(training, part)
            self.say_overlap(name, shared.rows, shared.prompts, shared.train_rows)
        if named:
            return source, {name.removeprefix("eval_"): part.dataset for name, part in prepared.items()}
        return source, prepared["eval"].dataset

    def _require_a_batch(self, rows: int) -> None:
        """Refuse to leave out the last batch of an epoch where that is the only one."""
        args = self.args
        batch = args.per_device_train_batch_size * args.world_size
        if args.dataloader_drop_last and rows < batch:
            raise ConfigError(
                f"is True, and the {rows} training rows do not fill one batch of {batch}, so that no step would be "
                "made. Leave it out, or lower per_device_train_batch_size.",
                "dataloader_drop_last",
            )

    def _hold_to_limits(self, *, streamed: bool) -> None:
        """Refuse rows in which more is found than `dataset_check` allows; of a stream, its first rows."""
        loaded, limits = self._loaded, cast(dict[str, float], self.args.dataset_check or {})
        self._loaded = {}
        if not limits or self.args.process_index != 0:  # the first process ends the others
            return
        train = loaded.pop("train")
        found = check_sets(
            train,
            loaded,
            kind=self.args.kind,
            tokenizer=self.tokenizer,
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            encoder_decoder=self.encoder_decoder,
            processes=granted_cores(),
        )
        if over := passed(found, limits):
            raise DataError(f"{'; '.join(over)}. Correct the rows, or raise the limits (dataset_check, `data.check`).")
        of = f"of the first {len(train):,} rows of the stream" if streamed else "of all rows"
        logger.info(f"train: {', '.join(limits)} {of} within the limits")

    def say_overlap(self, name: str, rows: int, prompts: int, train_rows: int) -> None:
        """Keep and say how many training rows, and rows with its prompts, are in an evaluation set."""
        self.reports[name]["overlap"] = Overlap(rows, prompts, train_rows).to_dict()
        if rows or prompts:
            logger.warning(
                f"{name}: {rows} of {train_rows} training rows are in this evaluation set word for "
                f"word, and {prompts} share a prompt with it; its figures are too good by as much."
            )


def _refuse_split(evaluation: Any) -> None:
    if is_split(evaluation):
        raise ConfigError(
            "eval asks for a part of the training rows, which are streamed: which rows to set aside is known when all "
            "are. Give held-out rows of their own, or read the training rows whole."
        )


def cache_folder(setting: str | None) -> Path | None:
    """The folder of prepared sets that `dataset_cache` stands for; None for none."""
    if setting is None:
        return None
    return cache_root() / "prepared" if setting == "auto" else Path(setting).expanduser()
