"""Supervised fine-tuning: the likelihood of completions, conversations or texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn

from tether.errors import ConfigError
from tether.objectives.supervised_loss import supervised_loss
from tether.training.algorithms.base import Algorithm, Needs
from tether.training.config import ReferenceFreeConfig
from tether.training.declaration import option
from tether.training.step import Context, MicroBatch
from tether.training.surface.accepted_options import AcceptedSupervisedArguments
from tether.training.trainer import ReferenceFreeTrainer
from tether.types import LossOutput, Scores, ScoringBatch


@dataclass
class SFTConfig(AcceptedSupervisedArguments, ReferenceFreeConfig, algorithm="sft"):
    """Configuration of `SFTTrainer`; names and defaults as in TRL 1.16.

    Rows are always packed without padding, so there is no option for it. Dropout is on, as it is a part of supervised
    fine-tuning.

    Raises:
        ConfigError: an unknown loss, or options that contradict each other.
    """

    learning_rate: float = 2e-5
    loss_type: str = option(
        "nll", "`nll`, the negative log-likelihood, or `dft`, dynamic fine-tuning.", key="objective.loss"
    )
    completion_only_loss: bool | None = option(
        None,
        "False scores the prompts of rows with a prompt and a completion too; rows of one text, or one conversation, "
        "are scored whole in any case.",
    )
    assistant_only_loss: bool = option(
        False, 'Score the assistant\'s turns of conversations only; the same as `turns="assistant"`.'
    )
    disable_dropout: bool = False

    def __post_init__(self) -> None:
        self.check_objective()
        if self.completion_only_loss is False and (self.assistant_only_loss or self.turns != "all"):
            other = "assistant_only_loss=True" if self.assistant_only_loss else f"turns={self.turns!r}"
            raise ConfigError(
                f"is False, which scores prompts, and {other} only what the assistant wrote. Leave one of them out.",
                "completion_only_loss",
            )
        if self.assistant_only_loss and self.turns == "last":
            raise ConfigError(
                "is True, which scores all the assistant's turns, and turns='last' one of them. Leave one out.",
                "assistant_only_loss",
            )
        if self.assistant_only_loss:
            self.turns = "assistant"
        super().__post_init__()


class SFT(Algorithm[Scores]):
    """See `SFTTrainer`."""

    config = SFTConfig
    args: SFTConfig

    @property
    def needs(self) -> Needs:
        """The prompts too, where the whole text counts."""
        return Needs(prompts=self.args.completion_only_loss is False)

    def check_model(self, model: str | Path | nn.Module) -> None:
        """A prompt that an encoder reads is not written by anyone, so it cannot be scored."""
        for name, value, free in (("completion_only_loss", False, None), ("assistant_only_loss", True, False)):
            if self.model_config.is_encoder_decoder and getattr(self.args, name) is value:
                raise ConfigError(
                    f"{name} is {value}, and {type(self.model_config).__name__} is of a model that reads prompts in an "
                    "encoder and writes completions in a decoder: completions alone, and all of them, are scored. Set "
                    f"{name} to {free}."
                )

    def loss_tokens(self, batch: ScoringBatch) -> int:
        """All scored tokens."""
        return len(batch.targets)

    def loss(self, policy: Scores, reference: Scores | None, part: MicroBatch, context: Context) -> LossOutput:
        """The configured loss of each token."""
        return supervised_loss(policy, loss=self.args.loss_type)

    def describe(self) -> str:
        """What is averaged."""
        what = {"all": "scored", "assistant": "the assistant's", "last": "the last turns'"}[self.args.turns]
        return f"objective: sft, {self.args.loss_type}: averaged over all {what} tokens of a step"


class SFTTrainer(ReferenceFreeTrainer):
    """Supervised fine-tuning on prompts and completions, conversations or texts; arguments as in TRL 1.16.

    The loss is the mean over all scored tokens of the optimizer step, micro-batches and processes included, so that a
    token counts the same in a full and in a half-empty micro-batch. No reference is loaded or run.

    Args:
        model: the policy; see `DPOTrainer` for all arguments.
        train_dataset: rows with `prompt` and `completion`, or `messages`, or `text`.
        formatting_func: makes a text of a row, in place of these columns; of rows in memory.

    Reference:
        Ouyang et al., Training language models to follow instructions with human feedback, arXiv:2203.02155.
    """

    args: SFTConfig  # type: ignore[override]
    algorithm_class = SFT

    def __init__(
        self,
        *given: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        **others: Any,
    ) -> None:
        if formatting_func is not None:
            train_dataset, eval_dataset = _texts(train_dataset, formatting_func), _texts(eval_dataset, formatting_func)
        sets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(*given, **{name: rows for name, rows in sets.items() if rows is not None}, **others)


def _texts(rows: Any, write: Callable[[dict[str, Any]], str]) -> Any:
    """Rows of one text each, or a dictionary of several sets of them."""
    if rows is None:
        return None
    if isinstance(rows, (Dataset, IterableDataset)):
        return rows.map(lambda row: {"text": write(row)}, remove_columns=rows.column_names)
    if isinstance(rows, Mapping):
        return {name: _texts(part, write) for name, part in rows.items()}
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        return [{"text": write(row)} for row in rows]
    raise ConfigError(
        f"formatting_func takes rows in memory; got {type(rows).__name__}. Load them first: datasets.load_dataset(...)."
    )
