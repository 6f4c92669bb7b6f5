"""Configuration of `SFTTrainer`."""

from __future__ import annotations

from dataclasses import dataclass

from tether.errors import ConfigError
from tether.training.declared import option
from tether.training.reference_free_arguments import ReferenceFreeConfig


@dataclass
class SFTConfig(ReferenceFreeConfig, algorithm="sft"):
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
