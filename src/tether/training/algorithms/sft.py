"""Supervised fine-tuning: the likelihood of completions, conversations or texts."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tether.errors import ConfigError
from tether.objectives.supervised import supervised_loss
from tether.training.algorithms.base import Algorithm, Needs
from tether.training.step import Context, MicroBatch
from tether.training.supervised_arguments import SFTConfig
from tether.training.trainer import ReferenceFreeTrainer
from tether.types import LossOutput, Scores, ScoringBatch


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

    Reference:
        Ouyang et al., Training language models to follow instructions with human feedback, arXiv:2203.02155.
    """

    args: SFTConfig  # type: ignore[override]
    algorithm_class = SFT
