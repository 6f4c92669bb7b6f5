"""Training configurations, shaped like TRL's: fields over `transformers.TrainingArguments`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from tether.errors import ConfigError
from tether.reference import ReferenceSpec
from tether.scoring import Layout
from tether.types import Kind, Meaning, Means

# Fields of TrainingArguments that would do nothing here, or harm: an option that cannot take effect is an error.
_WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "the batch is made of columns that no model's forward names"),
    "logging_nan_inf_filter": (False, "a loss that is not a number must be seen"),
    "label_smoothing_factor": (0.0, "it belongs to a loss over labels; `label_smoothing` is the objective's"),
    "label_names": (None, "batches have no labels"),
    "include_for_metrics": ([], "there is no compute_metrics"),
    "batch_eval_metrics": (False, "there is no compute_metrics"),
    "eval_accumulation_steps": (None, "no predictions are kept during evaluation"),
    "bf16_full_eval": (False, "evaluation scores as training does"),
    "fp16_full_eval": (False, "evaluation scores as training does"),
    "prediction_loss_only": (False, "evaluation keeps no predictions in any case"),
    "eval_use_gather_object": (False, "no predictions are gathered"),
    "resume_from_checkpoint": (None, "pass it to train()"),
    "use_liger_kernel": (False, "it would replace the model's forward, which scoring relies on"),
}


@dataclass
class PreferenceConfig(TrainingArguments):
    """What every preference trainer takes, on top of `transformers.TrainingArguments`.

    Defaults that differ from transformers' are TRL 1.16's (learning rate, logging, gradient checkpointing).

    Args:
        bf16: mixed precision in bfloat16; unset: on, where a CUDA device supports it.
        remove_unused_columns: stays off, the batch is made of columns that no model's forward names.
        logging_nan_inf_filter: stays off, a loss that is not a number must be seen.
        max_length: tokens of prompt and completion together; None: no truncation.
        truncation_mode: what is kept of a longer sequence: `keep_start` or `keep_end`.
        prompt_boundary: what to do when a prompt's tokens are no prefix of prompt and completion tokenised together:
            `split`, `drop` or `error`.
        dataset_num_proc: processes that prepare the data.
        disable_dropout: set every dropout probability of the policy to 0.
        model_init_kwargs: keywords for loading models that are named by a string.
        trust_remote_code: run code that comes with a model repository.
        reference: what the reference means: `start`, `base`, `model` or `none`; unset: `start`, or `model` when
            `ref_model` is given.
        reference_means: force how it is computed: `adapter_off`, `snapshot` or `model`; unset: chosen and printed.
        reference_check_steps: steps between two checks that the reference has not moved; 0: never.
        scoring_layout: force `tree` or `padded`; unset: `tree` where it is proved equal to scoring alone.

    Raises:
        ConfigError: a value that is not allowed.
    """

    # What the rows mean to each other; each kind of trainer has its own.
    kind: ClassVar[Kind] = "pair"

    learning_rate: float = 1e-6
    logging_steps: float = 10
    gradient_checkpointing: bool = True  # type: ignore[override]
    bf16: bool | None = None  # type: ignore[override]
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    prompt_boundary: str = "split"
    dataset_num_proc: int | None = None
    disable_dropout: bool = True
    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    reference: Meaning | None = None
    reference_means: Means | None = None
    reference_check_steps: int = 50
    scoring_layout: Layout | None = None

    def __post_init__(self) -> None:
        if self.bf16 is None:
            cuda = torch.cuda.is_available() and not self.use_cpu
            wanted = cuda and torch.cuda.is_bf16_supported() and not self.fp16
            self.bf16 = bool(wanted)  # type: ignore[assignment]
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        self._refuse("truncation_mode", ("keep_start", "keep_end"))
        self._refuse("prompt_boundary", ("split", "drop", "error"))
        self._refuse("scoring_layout", (None, "tree", "padded"))
        # Not group_by_length: rows have no one length, and packing gains nothing from batches of like lengths.
        self._refuse("train_sampling_strategy", ("random", "sequential"))
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 2):
            raise ConfigError(f"max_length is {self.max_length!r}; it must be None or a whole number from 2 tokens.")
        if isinstance(self.model_init_kwargs, str):
            self.model_init_kwargs = _keywords(self.model_init_kwargs)
        self._refuse("reference_means", (None, "adapter_off", "snapshot", "model"))
        if self.reference_check_steps < 0:
            raise ConfigError(f"reference_check_steps is {self.reference_check_steps}; it must be 0 (never) or more.")
        for name, (kept, reason) in _WITHOUT_EFFECT.items():
            if getattr(self, name, kept) != kept:
                raise ConfigError(f"{name}={getattr(self, name)!r} came; it must stay {kept!r}: {reason}.")
        ReferenceSpec(meaning=self.reference or "start", means=self.reference_means if self.reference else None)
        super().__post_init__()

    def _refuse(self, name: str, allowed: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(str(choice) for choice in allowed)}.")

    @property
    def turns(self) -> str:
        """Which turns of a completion of several are scored: `all`, or those of the `assistant`."""
        return "all"

    @property
    def cut_length(self) -> int | None:
        """Tokens to which a row's sequences are cut; None: not at all."""
        return self.max_length

    def objective_options(self) -> dict[str, float]:
        """Options for the objective, by name."""
        return {}


def _keywords(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"model_init_kwargs is {text!r}, which is no JSON ({error}); pass a dictionary.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"model_init_kwargs is {text!r}; it must be a JSON object, or a dictionary.")
    return found
