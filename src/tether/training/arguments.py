"""Training configurations, shaped like TRL's: fields over `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from tether.compute.cpu_matmul import LIBRARIES
from tether.data.rows.schema import TURNS, Turns
from tether.data.text.truncate import TRUNCATION_MODES
from tether.errors import ConfigError
from tether.scoring import Layout
from tether.training.reference_arguments import ReferenceArguments, keywords
from tether.types import Kind

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
class PreferenceConfig(ReferenceArguments, TrainingArguments):
    """What every preference trainer takes, on top of `transformers.TrainingArguments` and `ReferenceArguments`.

    Defaults that differ from transformers' are TRL 1.16's (learning rate, logging, gradient checkpointing).

    Args:
        bf16: mixed precision in bfloat16; unset: on, where a CUDA device supports it, or where it is measured to be
            faster on this CPU, which the trainer does when it knows the model's shapes.
        cpu_matmul: what multiplies float32 matrices on a CPU: torch's `default` library, or `onednn`, which computes
            the same with another rounding; `auto`: what is measured to be faster.
        remove_unused_columns: stays off, the batch is made of columns that no model's forward names.
        logging_nan_inf_filter: stays off, a loss that is not a number must be seen.
        max_length: tokens of prompt and completion together; None: no truncation.
        truncation_mode: what is kept of a longer sequence: `keep_start`, `keep_end`, `middle` or `drop`.
        prompt_boundary: what to do when a prompt's tokens are no prefix of prompt and completion tokenised together:
            `split`, `drop` or `error`.
        turns: what is scored of a completion of several turns, in conversations: `all` of it, what others say included,
            as TRL does; the turns of the `assistant`; or the `last` one of these.
        dataset_num_proc: processes that prepare the data.
        dataset_cache: folder where prepared rows are kept for the other processes of a run and for later runs; `auto`:
            `prepared` in `$TETHER_CACHE` or in `~/.cache/tether`; None: nowhere, and each process prepares for itself.
        dataset_streaming: prepare the training rows while training goes on, and never hold them all; so it is done for
            a `datasets.IterableDataset` in any case. Needs `max_steps`.
        dataset_buffer_size: rows of a stream among which each next one is drawn, as `datasets` shuffles streams; with
            `train_sampling_strategy="sequential"` none is drawn and rows come in their order.
        disable_dropout: set every dropout probability of the policy to 0.
        model_init_kwargs: keywords for loading models that are named by a string.
        trust_remote_code: run code that comes with a model repository.
        add_tokens: new tokens for tokenizer and model; each begins as the mean of all others.
        train_parameters: regular expressions, searched for in parameter names: only what they find trains (and an
            adapter); None: all.
        freeze_parameters: the same for what does not train.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts; unset: what the model's
            configuration says; 0: none.
        max_tokens_per_forward: split the examples of a device's batch into as few micro-batches as hold at most this
            many tokens (a prompt counted once with all its completions), with the gradient of the whole batch; `auto`:
            what the memory allows, printed; None: a batch is one forward.
        scoring_layout: force `tree` or `padded`; unset: `tree` where it is proved equal to scoring alone, and
            `encoder_decoder` for a model with an encoder.
        attention_backend: force what computes a tree's attention: `blocked`, `sdpa`, `flex` or `flash`; `auto`: blocks
            on a processor, FlexAttention on CUDA where it is proved, SDPA elsewhere.

    Raises:
        ConfigError: a value that is not allowed.
    """

    # What the rows mean to each other; each kind of trainer has its own.
    kind: ClassVar[Kind] = "pair"

    learning_rate: float = 1e-6
    logging_steps: float = 10
    gradient_checkpointing: bool = True  # type: ignore[override]
    bf16: bool | None = None  # type: ignore[override]
    cpu_matmul: str = "auto"
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    prompt_boundary: str = "split"
    turns: Turns = "all"
    dataset_num_proc: int | None = None
    dataset_cache: str | None = "auto"
    dataset_streaming: bool = False
    dataset_buffer_size: int = 1000
    disable_dropout: bool = True
    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    add_tokens: list[str] | None = None
    train_parameters: list[str] | None = None
    freeze_parameters: list[str] | None = None
    router_aux_loss_coef: float | None = None
    scoring_layout: Layout | None = None
    max_tokens_per_forward: int | str | None = "auto"
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        if self.bf16 is None and (self.fp16 or not self.computes_on_cpu()):
            self.bf16 = bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.fp16)  # type: ignore[assignment]
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        self._refuse("cpu_matmul", LIBRARIES)
        self._refuse("truncation_mode", TRUNCATION_MODES)
        self._refuse("prompt_boundary", ("split", "drop", "error"))
        self._refuse("turns", TURNS)
        self._refuse("scoring_layout", (None, "tree", "padded", "encoder_decoder"))
        self._refuse("attention_backend", ("auto", "blocked", "sdpa", "flex", "flash"))
        # Not group_by_length: rows have no one length, and packing gains nothing from batches of like lengths.
        self._refuse("train_sampling_strategy", ("random", "sequential"))
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 2):
            raise ConfigError(f"max_length is {self.max_length!r}; it must be None or a whole number from 2 tokens.")
        size = self.dataset_buffer_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"dataset_buffer_size is {size!r}; it must be a whole number from 1 row.")
        if self.dataset_streaming:
            self.require_streamable()
        limit = self.max_tokens_per_forward
        if isinstance(limit, str) and limit.isdigit():  # from a command line
            limit = self.max_tokens_per_forward = int(limit)
        if limit not in (None, "auto") and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ConfigError(
                f"max_tokens_per_forward is {limit!r}; it must be `auto`, None or a whole number from 1 token."
            )
        if self.router_aux_loss_coef is not None and not self.router_aux_loss_coef >= 0:
            raise ConfigError(f"router_aux_loss_coef is {self.router_aux_loss_coef}; it must be 0 (none) or more.")
        self.model_init_kwargs = keywords("model_init_kwargs", self.model_init_kwargs)
        self.check_reference()
        for name, (kept, reason) in _WITHOUT_EFFECT.items():
            if getattr(self, name, kept) != kept:
                raise ConfigError(f"{name}={getattr(self, name)!r} came; it must stay {kept!r}: {reason}.")
        super().__post_init__()

    def require_streamable(self) -> None:
        """Refuse what training rows that are streamed cannot do.

        Raises:
            ConfigError: an option that needs all rows, or would do nothing.
        """
        if self.max_steps < 1:
            raise ConfigError(
                f"max_steps is {self.max_steps}, and the training rows are streamed, so that no one knows how many "
                "there are. Set how many steps the run has (the stream begins anew when it ends), or read the rows "
                "whole."
            )
        if self.dataloader_num_workers:
            raise ConfigError(
                f"dataloader_num_workers is {self.dataloader_num_workers}, and the training rows are streamed: they "
                "are prepared ahead in the background already. Set dataset_num_proc to prepare them in several "
                "processes."
            )

    def computes_on_cpu(self) -> bool:
        """Whether the trainer may still decide on the precision; DeepSpeed is configured with it from the start."""
        return (self.use_cpu or not torch.accelerator.is_available()) and self.deepspeed is None

    def _refuse(self, name: str, allowed: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(str(choice) for choice in allowed)}.")

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares with a reference at all."""
        return True

    @property
    def objective_name(self) -> str:
        """What the objective is called, for messages."""
        return type(self).__name__

    def objective_options(self) -> dict[str, float]:
        """Options for the objective, by name."""
        return {}
