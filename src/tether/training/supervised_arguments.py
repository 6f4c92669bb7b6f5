"""Configuration of `SFTTrainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tether.errors import ConfigError
from tether.objectives.supervised import SUPERVISED
from tether.training.reference_free_arguments import ReferenceFreeConfig
from tether.types import Kind


@dataclass
class SFTConfig(ReferenceFreeConfig):
    """Configuration of `SFTTrainer`; names and defaults as in TRL 1.16.

    Rows are always packed without padding, so there is no option for it.

    Args:
        loss_type: `nll`, the negative log-likelihood, or `dft`, dynamic fine-tuning.
        completion_only_loss: False scores the prompts of rows with a prompt and a completion too; rows of one text, or
            one conversation, are scored whole in any case.
        assistant_only_loss: score the assistant's turns of conversations only; the same as `turns="assistant"`.
        disable_dropout: off, as dropout is a part of supervised fine-tuning.

    Raises:
        ConfigError: an unknown loss, or options that contradict each other.
    """

    kind: ClassVar[Kind] = "completion"

    learning_rate: float = 2e-5
    loss_type: str = "nll"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    disable_dropout: bool = False

    def __post_init__(self) -> None:
        if self.loss_type not in SUPERVISED:
            raise ConfigError(f"loss_type is {self.loss_type!r}; allowed are {', '.join(SUPERVISED)}.")
        if self.assistant_only_loss and self.completion_only_loss is False:
            raise ConfigError(
                "completion_only_loss=False scores prompts and assistant_only_loss=True only what the assistant wrote. "
                "Leave one of them out."
            )
        if self.assistant_only_loss and self.turns == "last":
            raise ConfigError(
                "assistant_only_loss=True scores all the assistant's turns and turns='last' one of them. Leave one out."
            )
        if self.turns != "all" and self.completion_only_loss is False:
            raise ConfigError(
                f"completion_only_loss=False scores prompts and turns={self.turns!r} only what the assistant wrote. "
                "Leave one of them out."
            )
        if self.assistant_only_loss:
            self.turns = "assistant"
        super().__post_init__()
