"""Training configurations, shaped like TRL's: fields over `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from tether.errors import ConfigError
from tether.objectives import check_options
from tether.reference import ReferenceSpec
from tether.types import Meaning, Means


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PreferenceConfig(TrainingArguments):
    """What every preference trainer takes, on top of `transformers.TrainingArguments`.

    Defaults that differ from transformers' are TRL 1.16's: `learning_rate` 1e-6, `logging_steps` 10,
    `gradient_checkpointing` on, bfloat16 where the device computes it well (CUDA with bfloat16 support).
    """

    learning_rate: float = _help("Initial learning rate for AdamW.", 1e-6)
    logging_steps: float = _help("Steps between two logs.", 10)
    gradient_checkpointing: bool = _help("Recompute activations in the backward to save memory.", True)
    bf16: bool | None = _help("Mixed precision in bfloat16; unset: on a CUDA device that supports it.", None)
    remove_unused_columns: bool = _help("Kept off: the batch is made of columns that no model forward names.", False)
    logging_nan_inf_filter: bool = _help("Kept off: a loss that is not a number must be seen.", False)

    max_length: int | None = _help("Tokens of prompt and completion together; None: no truncation.", 1024)
    truncation_mode: str = _help("What is kept of a sequence that is too long: keep_start or keep_end.", "keep_start")
    prompt_boundary: str = _help(
        "When a prompt's tokens are no prefix of prompt and completion tokenised together: split, drop or error.", "split"
    )
    dataset_num_proc: int | None = _help("Processes that prepare the data.", None)
    disable_dropout: bool = _help("Set every dropout probability of the policy to 0.", True)
    model_init_kwargs: dict[str, Any] | str | None = _help("Keywords for loading a model named by a string.", None)
    trust_remote_code: bool = _help("Run code that comes with a model repository.", False)
    reference: Meaning | None = _help(
        "What the reference means: start, base, model or none; unset: start, or model when ref_model is given.", None
    )
    reference_means: Means | None = _help(
        "Force how the reference is computed: adapter_off, snapshot or model; unset: chosen and printed.", None
    )
    reference_check_steps: int = _help("Steps between two checks that the reference has not moved; 0: never.", 50)
    scoring_layout: str | None = _help("Force tree or padded; unset: tree where it is proved equal.", None)

    def __post_init__(self) -> None:
        if self.bf16 is None:
            cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = bool(cuda and torch.cuda.is_bf16_supported() and not self.fp16)
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        self._refuse("truncation_mode", ("keep_start", "keep_end"))
        self._refuse("prompt_boundary", ("split", "drop", "error"))
        self._refuse("scoring_layout", (None, "tree", "padded"))
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; a prompt and a completion need at least 2 tokens.")
        if self.reference_check_steps < 0:
            raise ConfigError(f"reference_check_steps is {self.reference_check_steps}; it must be 0 (never) or more.")
        for name in ("remove_unused_columns", "logging_nan_inf_filter"):
            if getattr(self, name):
                raise ConfigError(f"{name}=True came; Tether trains with it off, see the field's help.")
        ReferenceSpec(meaning=self.reference or "start", means=self.reference_means if self.reference else None)
        super().__post_init__()

    def _refuse(self, name: str, allowed: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(str(choice) for choice in allowed)}.")

    def objective_options(self) -> dict[str, float]:
        """Options for the objective, by name."""
        return {}


@dataclass
class DPOConfig(PreferenceConfig):
    """Configuration of `DPOTrainer`; names and defaults as in TRL 1.16.

    Raises:
        ConfigError: an unknown loss, or an option outside its range.
    """

    loss_type: str | list[str] = _help("Name of the loss; see tether.objectives.OBJECTIVES.", "sigmoid")
    beta: float = _help("How strongly the policy is held to the reference, per nat.", 0.1)
    label_smoothing: float = _help("Chance that a label is wrong, from 0 to below 0.5.", 0.0)

    def __post_init__(self) -> None:
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if len(names) != 1:
            raise ConfigError(f"loss_type is {names!r}; one loss is needed. Several at once are not available yet.")
        self.loss_type = names[0]
        problem = check_options(self.loss_type, self.objective_options())
        if problem:
            raise ConfigError(problem)
        super().__post_init__()

    def objective_options(self) -> dict[str, float]:
        """`beta` and `label_smoothing`."""
        return {"beta": self.beta, "label_smoothing": self.label_smoothing}
