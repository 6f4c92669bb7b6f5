"""The data sets of a run: prepared before any weights load, reported, and compared with each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.data import (
    Prepared,
    Report,
    chat_template,
    example_from_row,
    is_origin,
    is_split,
    load_rows,
    longest_row,
    overlap,
    prepare_cached,
    split_rows,
)
from tether.data.check import FINDINGS, check
from tether.models.gguf import cache_root
from tether.training.arguments import PreferenceConfig
from tether.types import Example

logger = logging.getLogger("tether")
CHAT_TEMPLATE = "chat_template.jinja"
_AUDITED_ROWS = 2000
# Findings of the sample that are worth a line, above this share; the others are in the run folder.
_WARNED = ("contradictions", "near_duplicates", "odd_roles", "other_script", "refusals")
_TELLING = 0.05
_FRONT = 32
Rows = Dataset | list[dict[str, Any]] | Mapping[str, Any] | str | Path | list[str]


@dataclass
class RunData:
    """Prepares rows for one run and keeps the reports.

    Args:
        tokenizer: the policy's, or its processor.
        args: lengths, truncation, boundary policy.
        arrange: what is done to prepared rows before they are packed.
        encoder_decoder: whether the policy reads prompts in an encoder.
        reports: name of a set to its report, for `data.json`.
    """

    tokenizer: PreTrainedTokenizerBase | ProcessorMixin
    args: PreferenceConfig
    arrange: Callable[[Prepared, Any], Prepared] = field(default=lambda prepared, _: prepared)
    encoder_decoder: bool = False
    reports: dict[str, Any] = field(default_factory=dict)

    def prepare(self, name: str, rows: Rows) -> Prepared:
        """Prepare one set, or take it from the cache, and say what was done to it; see `tether.data.prepare`."""
        data = load_rows(rows, kind=self.args.kind, name=name)
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
            name=name,
        )
        prepared = self.arrange(prepared, self.args)
        self.reports[name] = prepared.report.to_dict()
        if self.args.process_index == 0:  # the one that writes data.json; the others go on, and wait for nothing here
            self.reports[name]["audit"] = self._audit(name, data)
        for line in prepared.report.lines():
            logger.info(line)
        return prepared

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
        shares = {finding: one.share for finding, one in found.findings.items()}
        return {"sampled_rows": found.rows, **shares, **found.length_bias}

    def prepare_all(self, train: Rows, evaluation: Rows | Mapping[str, Rows] | None) -> tuple[Dataset, Any]:
        """Prepare the training set and the evaluation sets, and count training rows inside each of the latter.

        Returns:
            The training set, and the evaluation set, a dictionary of them, or None.
        """
        if is_split(evaluation):
            asked, kind = cast(Mapping[str, Any], evaluation), self.args.kind
            train, evaluation = split_rows(load_rows(train, kind=kind, name="train"), asked, kind=kind)
        training = self.prepare("train", train)
        self._keep_template(training.report)
        if evaluation is None:
            return training.dataset, None
        named = isinstance(evaluation, Mapping) and not is_origin(evaluation)
        sets = cast(Mapping[str, Rows], evaluation if named else {"": evaluation})
        parts = {f"eval_{name}" if named else "eval": rows for name, rows in sets.items()}
        prepared = {name: self.prepare(name, rows) for name, rows in parts.items()}
        for name, part in prepared.items():
            shared = overlap(training, part)
            self.reports[name]["overlap"] = shared.to_dict()
            if shared.rows or shared.prompts:
                logger.warning(
                    f"{name}: {shared.rows} of {shared.train_rows} training rows are in this evaluation set word for "
                    f"word, and {shared.prompts} share a prompt with it; its figures are too good by as much."
                )
        if named:
            return training.dataset, {name.removeprefix("eval_"): part.dataset for name, part in prepared.items()}
        return training.dataset, prepared["eval"].dataset


def cache_folder(setting: str | None) -> Path | None:
    """The folder of prepared sets that `dataset_cache` stands for; None for none."""
    if setting is None:
        return None
    return cache_root() / "prepared" if setting == "auto" else Path(setting).expanduser()


def probe_examples(rows: Dataset, count: int, *, longest: bool = False) -> list[Example]:
    """A few real rows for a check: the shortest near the front, so that it is cheap; with a long one on request.

    Args:
        rows: a prepared set.
        count: how many, at least 2 with `longest`.
        longest: begin with the longest row of all, for what depends on length, such as sliding windows.
    """
    front = [example_from_row(rows[i]) for i in range(min(_FRONT, len(rows)))]
    front.sort(key=lambda example: len(example.prompt_ids) + sum(len(ids) for ids in example.completion_ids))
    return [example_from_row(rows[longest_row(rows)]), *front[: count - 1]] if longest else front[:count]
