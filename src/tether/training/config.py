"""Training configurations, shaped like TRL's: fields over `transformers.TrainingArguments`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from transformers import TrainingArguments
from transformers.utils.import_utils import is_torch_tf32_available

from tether.compat.accelerate import begin_group_on_cpu, require_launcher, require_whole_rows
from tether.compat.launcher import launched_precision
from tether.compute.cpu_matmul import LIBRARIES
from tether.data.audit.limits import check_limits
from tether.data.images.sizes import check_sizes
from tether.data.rows.schema import TURNS, Turns
from tether.data.text.truncate import TRUNCATION_MODES
from tether.errors import ConfigError
from tether.models.spec import check_special_tokens
from tether.objectives import Range
from tether.reference import ReferenceSpec, RemoteOptions, Sync
from tether.reference.spec import Keep
from tether.scoring import Layout
from tether.training.declaration import Declared, Whole, keywords, option, read_number
from tether.training.surface.accepted_options import AcceptedArguments
from tether.types import Kind, Meaning, Method

logger = logging.getLogger("tether")
# Fields of TrainingArguments that would do nothing here, or harm: an option that cannot take effect is an error.
_WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "logging_nan_inf_filter": (False, "a loss that is not a number must be seen"),
    "label_smoothing_factor": (0.0, "it belongs to a loss over labels; `label_smoothing` is the objective's"),
    "label_names": (None, "batches have no labels"),
    "include_for_metrics": ([], "compute_metrics is given each row's log-probs and rewards, and no inputs"),
    "batch_eval_metrics": (False, "compute_metrics is called once, with all rows of an evaluation"),
    "eval_accumulation_steps": (
        None,
        "no logits are kept during evaluation, and a few numbers of a row need no moving",
    ),
    "bf16_full_eval": (False, "evaluation scores as training does"),
    "fp16_full_eval": (False, "evaluation scores as training does"),
    "prediction_loss_only": (False, "predictions are kept for compute_metrics alone"),
    "eval_use_gather_object": (False, "what compute_metrics is given consists of tensors"),
    "use_liger_kernel": (False, "it would replace the model's forward, which scoring relies on"),
    "liger_kernel_config": (None, "Liger's kernels would replace the model's forward, which scoring relies on"),
    "eval_do_concat_batches": (True, "compute_metrics is given one array of all rows"),
    "include_num_input_tokens_seen": ("no", "num_tokens is logged in any case"),
    "average_tokens_across_devices": (True, "a loss has the denominators of the whole step in any case"),
    "length_column_name": ("length", "rows are not grouped by length"),
    "use_cache": (False, "training makes no use of a key-value cache"),
    "torch_empty_cache_steps": (None, "a step is split by max_tokens_per_forward; lower that where memory is short"),
}
_DEBUG = (
    "transformers' detector stops at the output of the head, which is empty here since logits are never built; a loss "
    "or gradient that is not finite stops a run in any case. Leave it out"
)
# The least that numbers of TrainingArguments may be, of which transformers checks few, and those at odd places.
_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"), 0),
    "num_train_epochs": 0,
}
# What weights and the optimizer's state can hold; torch fails at a larger number in the midst of a step.
_FLOAT32_MAX = float(torch.finfo(torch.float32).max)
# Fields that take a mapping, or one as JSON text; of TrainingArguments the second.
_OWN_MAPPINGS = ("dataset_check", "special_tokens", "model_init_kwargs", "chat_template_kwargs", "image_sizes")
_MAPPINGS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "accelerator_config")


@dataclass
class ReferenceArguments(Declared):
    """What the reference means and, where it is forced, how it is computed; TRL's names where TRL has one.

    Raises:
        ConfigError: a value that is not allowed, or values that say different things.
    """

    reference: Meaning | None = option(
        None,
        "What the reference means: `start`, `base`, `model`, `adapter` or `none`; unset: `start`, or `model` or "
        "`adapter` where one is given.",
        key="reference.meaning",
    )
    reference_adapter: str | None = option(
        None,
        "An adapter as the reference: the name of one that is loaded on the policy, or a folder.",
        key="reference.adapter",
    )
    reference_method: Method | None = option(
        None,
        "Force how it is computed: `adapter_off`, `adapter_on`, `snapshot`, `model` or `remote`; unset: chosen and "
        "printed.",
        allowed=(None, "adapter_off", "adapter_on", "snapshot", "model", "remote"),
        key="reference.method",
    )
    reference_snapshot: Keep | None = option(
        None,
        "Where a snapshot is kept, `device` or `host`; unset: by free memory.",
        allowed=(None, "device", "host"),
        key="reference.snapshot",
    )
    reference_remote: dict[str, Any] | str | None = option(
        None,
        "A server as the method: `url`, and further fields of `tether.reference.RemoteOptions`.",
        key="reference.remote",
    )
    reference_check_steps: int = option(
        50, "Steps between two checks that the reference has not moved; 0: never.", allowed=(Whole(0),)
    )
    ref_model_init_kwargs: dict[str, Any] | str | None = option(
        None,
        "Keywords for loading a `ref_model` that is named by a string, such as `revision`, `dtype`, `device_map`, "
        "`attn_implementation`, or `quantization` (`4bit` or `8bit`); what is left out is as in `model_init_kwargs`, "
        "without the policy's revision.",
        key="reference",
    )
    reference_store: str | None = option(
        None,
        "Folder or fsspec address of a store of reference log-probs: what is there is read, what is missing is "
        "computed and added; unset: no store.",
        key="reference.store",
    )
    reference_store_dtype: str = option(
        "float32",
        "What the store keeps, `float32` or `float16`.",
        allowed=("float32", "float16"),
        key="reference.store_dtype",
    )
    precompute_ref_log_probs: bool = option(
        False, "Fill the store before the first step; without `reference_store` it is in the output folder."
    )
    precompute_ref_batch_size: int | None = option(
        None,
        "Rows per pass of that; unset: those of a training or evaluation batch.",
        allowed=(None, Whole(1)),
    )
    sync_ref_model: bool = option(
        False, "Move the reference towards the policy during training (TR-DPO).", key="reference.sync"
    )
    ref_model_mixup_alpha: float = option(
        0.6,
        "The policy's share in the reference after a move, above 0 and at most 1; 1 replaces it.",
        allowed=(Range(0, 1, low_included=False, high_included=True),),
        key="reference.sync.alpha",
    )
    ref_model_sync_steps: int = option(
        512, "Optimizer steps between two moves.", allowed=(Whole(1),), key="reference.sync.steps"
    )

    def go_without_reference(self, why: str, *asking: str) -> None:
        """Declare that none is loaded or run.

        Args:
            why: for the message: what compares with none.
            asking: fields that would ask for one.

        Raises:
            ConfigError: one of them does.
        """
        defaults = {field.name: field.default for field in fields(ReferenceArguments)}
        for name in asking:
            value = getattr(self, name)
            if value != defaults[name] and (name, value) != ("reference", "none"):
                raise ConfigError(f"is {value!r}, but {why}. Leave it out; none is loaded or run.", name)
        self.reference = "none"

    def check_reference(self) -> None:
        """Find what is wrong with these options before anything is loaded."""
        moved = {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512}
        idle = [name for name, default in moved.items() if getattr(self, name) != default]
        if idle and not self.sync_ref_model:
            raise ConfigError(
                "was given without sync_ref_model, so the reference would not move. Set sync_ref_model=True, or leave "
                "it out.",
                idle[0],
            )
        self._check_store()
        for name in ("ref_model_init_kwargs", "reference_remote"):
            setattr(self, name, keywords(name, getattr(self, name)))
        if self.reference_remote is not None:
            # A server alone is another model; it is the policy's start only where that is said, and then proved.
            self.reference = self.reference or "model"
            self.reference_method = self.reference_method or "remote"
        if self.reference_adapter is not None:
            if self.reference not in (None, "adapter"):
                raise ConfigError(
                    f"was given and reference is {self.reference!r}; the two say different things. Leave one of them "
                    "out.",
                    "reference_adapter",
                )
            self.reference = "adapter"
        if self.reference == "adapter" and self.reference_adapter is None:
            raise ConfigError(
                "is 'adapter' but no reference_adapter was given. Name one that is loaded on the policy, or give the "
                "folder of one.",
                "reference",
            )
        if self.reference is not None or self.reference_method == "remote":
            self.reference_spec()

    def wants_store(self) -> bool:
        """Whether the reference's log-probabilities are kept."""
        return self.reference_store is not None or self.precompute_ref_log_probs

    @property
    def _store_field(self) -> str:
        return "precompute_ref_log_probs" if self.reference_store is None else "reference_store"

    def _check_store(self) -> None:
        """An option of the store that would do nothing, or that cannot be right, is an error."""
        if self.wants_store() and (self.reference == "none" or self.sync_ref_model):
            why = "a moving reference is another one after each move" if self.sync_ref_model else "reference is 'none'"
            raise ConfigError(f"was given, but {why}, so there is nothing to store. Leave it out.", self._store_field)
        if self.reference_store == "":
            raise ConfigError("is empty; name a folder or an fsspec address, or leave it out.", "reference_store")
        if self.reference_store_dtype != "float32" and not self.wants_store():
            raise ConfigError(
                "was given without a store; set reference_store, or leave it out.", "reference_store_dtype"
            )
        if self.precompute_ref_batch_size is not None and not self.precompute_ref_log_probs:
            raise ConfigError(
                f"is {self.precompute_ref_batch_size}; it needs precompute_ref_log_probs=True.",
                "precompute_ref_batch_size",
            )

    def reference_spec(self, meaning: Meaning | None = None, **found: Any) -> ReferenceSpec:
        """The declaration; `found` are fields that only the trainer knows, such as the other model."""
        remote = self.reference_remote
        try:
            options = RemoteOptions(**remote) if isinstance(remote, dict) else None
        except TypeError as error:
            names = ", ".join(RemoteOptions.__dataclass_fields__)
            raise ConfigError(f"is {remote!r}; its keys may be {names} ({error}).", "reference_remote") from error
        return ReferenceSpec(
            meaning=meaning or self.reference or "start",
            method=self.reference_method,
            keep=self.reference_snapshot,
            remote=options,
            sync=Sync(self.ref_model_sync_steps, self.ref_model_mixup_alpha) if self.sync_ref_model else None,
            **found,
        )


@dataclass
class PreferenceConfig(ReferenceArguments, AcceptedArguments, TrainingArguments):
    """What every trainer takes, on top of `transformers.TrainingArguments` and `ReferenceArguments`.

    Defaults that differ from transformers' are TRL 1.16's (learning rate, logging, gradient checkpointing).

    Raises:
        ConfigError: a value that is not allowed.
    """

    learning_rate: float = 1e-6
    logging_steps: float = option(
        10, "Log after every so many steps; below 1: after such a share of all steps.", allowed=(Range(0),)
    )
    gradient_checkpointing: bool = option(  # type: ignore[override]
        True, "Compute activations again in the backward pass in place of keeping them: less memory, more time."
    )
    parallelism_config: dict[str, Any] | None = option(  # type: ignore[override]
        None, "Stays None: every process computes rows of its own; FSDP and DeepSpeed's ZeRO cut weights."
    )
    bf16: bool | None = option(  # type: ignore[override]
        None,
        "Mixed precision in bfloat16; unset: on, where a CUDA device supports it, or where it is measured to be faster "
        "on this CPU, which the trainer does when it knows the model's shapes.",
    )
    cpu_matmul: str = option(
        "auto",
        "What multiplies float32 matrices on a CPU: torch's `default` library, or `onednn`, which computes the same "
        "with another rounding; `auto`: what is measured to be faster.",
        allowed=LIBRARIES,
    )
    cpu_threads: int | str | None = option(
        "auto",
        "Threads that torch computes with on a CPU; `auto`: as many as affinity, a container's quota and short "
        "measurements say, at the start and where other processes come or go, unless OMP_NUM_THREADS or "
        "torch.set_num_threads has chosen; None: as torch has them.",
        allowed=("auto", None, Whole(1, "thread")),
    )
    remove_unused_columns: bool = option(
        True, "Taken as TRL has it; no column is removed by it, since rows are prepared beforehand."
    )
    logging_nan_inf_filter: bool = option(False, "Stays off, a loss that is not a number must be seen.")
    max_length: int | None = option(
        1024,
        "Tokens of prompt and completion together; None: no truncation.",
        allowed=(None, Whole(2, "tokens")),
    )
    truncation_mode: str = option(
        "keep_start",
        "What is kept of a longer sequence: `keep_start`, `keep_end`, `middle` or `drop`; `error`: it stops the run.",
        allowed=TRUNCATION_MODES,
    )
    prompt_boundary: str = option(
        "split",
        "What to do when a prompt's tokens are not a prefix of prompt and completion tokenised together: `split`, "
        "`drop` or `error`.",
        allowed=("split", "drop", "error"),
    )
    turns: Turns = option(
        "all",
        "What is scored of a completion of several turns, in conversations: `all` of it, what others say included, as "
        "TRL does; the turns of the `assistant`; or the `last` one of these.",
        allowed=TURNS,
    )
    dataset_num_proc: int | None = option(None, "Processes that prepare the data.", allowed=(None, Whole(1)))
    dataset_cache: str | None = option(
        "auto",
        "Folder where prepared rows are kept for the other processes of a run and for later runs; `auto`: `prepared` "
        "in `$TETHER_CACHE` or in `~/.cache/tether`; None: nowhere, and each process prepares for itself.",
        key="data.cache",
    )
    dataset_check: dict[str, float] | str | None = option(
        None,
        'Largest shares of rows with each finding of `tether data check`, such as `{"identical": 0.01}`; a run whose '
        "rows are above one is refused before weights load. Of a stream, its first rows are looked at.",
        key="data.check",
    )
    stream_dataset: bool = option(
        False,
        "Prepare the training rows while training goes on, and never hold them all; so it is done for a "
        "`datasets.IterableDataset` in any case. Needs `max_steps`.",
        key="data.streaming",
    )
    dataset_buffer_size: int = option(
        1000,
        "Rows of a stream among which each next one is drawn; with "
        '`train_sampling_strategy="sequential"` none is drawn and rows come in their order.',
        allowed=(Whole(1, "row"),),
        key="data.buffer_size",
    )
    disable_dropout: bool = option(True, "Set every dropout probability of the policy to 0.")
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keywords for loading models that are named by a string.", key="model"
    )
    trust_remote_code: bool = option(
        False, "Run code that comes with a model repository.", key="model.trust_remote_code"
    )
    add_tokens: list[str] | None = option(
        None,
        "New tokens for tokenizer and model; each begins as the mean of all others.",
        key="model.add_tokens",
    )
    chat_template_path: str | None = option(
        None,
        "Chat template that conversations are written with: chatml, gemma, llama3, phi3, qwen25 or zephyr, a file of "
        "it (.jinja), its text, or the name or folder of a tokenizer whose template it is; after `fallback:` it is "
        "taken only where the model has none; None: the model's own.",
        key="model.chat_template",
    )
    special_tokens: dict[str, str] | str | None = option(
        None,
        "Special tokens of the tokenizer, such as `{eos_token: <|im_end|>}`; one that its vocabulary lacks is added.",
        key="model.special_tokens",
    )
    default_system: str | None = option(
        None, "System message of conversations that begin with none.", key="data.system"
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None,
        "Arguments of the chat template, such as `{enable_thinking: false}`; those of a row count before these.",
        key="data.chat_template_kwargs",
    )
    image_sizes: dict[str, Any] | str | None = option(
        None,
        "Sizes that images are brought to before the processor, such as `{max_pixels: 589824}`; `min_pixels`, `size`, "
        "`resample`.",
        key="data.images",
    )
    deduplicate: bool = option(
        False, "Leave out training rows that are exactly those of an earlier row.", key="data.deduplicate"
    )
    train_parameters: list[str] | None = option(
        None,
        "Regular expressions, searched for in parameter names: only what they find trains (and an adapter); None: all.",
        key="model.train",
    )
    freeze_parameters: list[str] | None = option(None, "The same for what does not train.", key="model.freeze")
    loraplus_lr_ratio: float | None = option(
        None,
        "LoRA+: learning rate of the second matrix of an adapter (B), as a multiple of the first one's; unset: the "
        "same.",
        allowed=(None, Range(0, low_included=False)),
    )
    loraplus_lr_embedding: float = option(
        1e-6,
        "With `loraplus_lr_ratio`: learning rate of adapters on embeddings.",
        allowed=(Range(0, low_included=False),),
    )
    router_aux_loss_coef: float | None = option(
        None,
        "Weight of the load-balancing loss of a mixture of experts; unset: what the model's configuration says; 0: "
        "none.",
        allowed=(None, Range(0)),
    )
    scoring_layout: Layout | None = option(
        None,
        "Force `tree` or `padded`; unset: `tree` where it is proved equal to scoring alone, and `encoder_decoder` for "
        "a model with an encoder.",
        allowed=(None, "tree", "padded", "encoder_decoder"),
    )
    max_tokens_per_forward: int | str | None = option(
        "auto",
        "Split the examples of a device's batch into as few micro-batches as hold at most this many tokens (a prompt "
        "counted once with all its completions), with the gradient of the whole batch; `auto`: what the memory allows, "
        "printed; None: a batch is one forward.",
        allowed=("auto", None, Whole(1, "token")),
    )
    attention_backend: str = option(
        "auto",
        "Force what computes a tree's attention: `blocked`, `sdpa`, `flex`, `varlen` or `flash`; `auto`: blocks on a "
        "CPU, FlexAttention on CUDA where it is proved, SDPA elsewhere.",
        allowed=("auto", "blocked", "sdpa", "flex", "varlen", "flash"),
    )

    def __post_init__(self) -> None:
        # Without an accelerator there is nothing else to compute on, and transformers wants it said.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.activation_checkpointing is not None:  # the newer name of the two, which has no default of TRL's
            self.gradient_checkpointing = self.activation_checkpointing  # type: ignore[override]
        if self.bf16 is None and (self.fp16 or not self.computes_on_cpu()):
            self.bf16 = bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.fp16)  # type: ignore[assignment]
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        for name in ("max_tokens_per_forward", "cpu_threads"):
            if isinstance(value := getattr(self, name), str) and value.isdigit():  # from a command line
                setattr(self, name, int(value))
        self.check_declared()
        self.check_accepted()
        # Not group_by_length: rows have no one length, and packing gains nothing from batches of like lengths.
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ConfigError(
                f"is {self.train_sampling_strategy!r}; allowed are random, sequential.", "train_sampling_strategy"
            )
        if odd := next((name for name in ("seed", "data_seed") if not 0 <= (getattr(self, name) or 0) < 2**32), None):
            raise ConfigError(f"is {getattr(self, odd)}; allowed is a whole number from 0 to {2**32 - 1}.", odd)
        if self.stream_dataset:
            self.require_streamable()
        for name in _OWN_MAPPINGS:
            setattr(self, name, keywords(name, getattr(self, name)))
        check_limits(cast(Any, self.dataset_check) or {})
        check_special_tokens(cast(Any, self.special_tokens))
        check_sizes(cast(Any, self.image_sizes))
        if self.deduplicate and self.stream_dataset:
            raise ConfigError("is True, and the training rows are streamed, so that none is remembered.", "deduplicate")
        self.check_reference()
        if self.include_num_input_tokens_seen is False:  # what a command line says of the default
            self.include_num_input_tokens_seen = "no"
        for name, (kept, reason) in _WITHOUT_EFFECT.items():
            if getattr(self, name, kept) != kept:
                raise ConfigError(f"is {getattr(self, name)!r}; it must stay {kept!r}: {reason}.", name)
        for name in _MAPPINGS:
            if isinstance(value := getattr(self, name, None), str) and value.startswith("{"):
                setattr(self, name, keywords(name, value))
        self.remove_unused_columns = False
        self._check_numbers()
        self._check_machine()
        require_launcher()
        require_whole_rows(self.parallelism_config, self.deepspeed)
        if self.use_cpu and self.ddp_backend in (None, "gloo"):
            begin_group_on_cpu(self.ddp_timeout)
        super().__post_init__()

    def _check_numbers(self) -> None:
        for name, least in _LEAST.items():
            value = read_number(self, name)
            if isinstance(value, (int, float)) and not least <= value <= _FLOAT32_MAX:
                raise ConfigError(f"is {value!r}; it must be a number from {least} to 3.4e38.", name)
        for name in ("adam_beta1", "adam_beta2"):
            if isinstance(value := getattr(self, name), (int, float)) and value >= 1:
                raise ConfigError(f"is {value!r}; it must be below 1.", name)
        if self.max_steps == 0:
            raise ConfigError("is 0, by which all epochs would be trained. Give -1, or 1 or more.", "max_steps")

    def _check_machine(self) -> None:
        """Refuse what cannot work, before transformers fails at it later or calls it by another name."""
        if self.debug:
            raise ConfigError(f"is {self.debug!r}: {_DEBUG}.", "debug")
        if self.use_cpu and (self.fp16 or (launched_precision() == "fp16" and not self.bf16)):
            said = "is True" if self.fp16 else "was asked for by the launcher (ACCELERATE_MIXED_PRECISION)"
            raise ConfigError(f"{said}, and the run computes on a CPU, which has no float16. Set bf16=True.", "fp16")
        if self.tf32 and not is_torch_tf32_available():
            logger.info("tf32: no device here computes in TF32; products stay as they are")
            self.tf32 = None
        settings = self.accelerator_config
        if isinstance(settings, dict) and settings.get("dispatch_batches"):
            raise ConfigError(
                f"is {settings!r}: one process cannot deal out the batches of all, as packed batches have no common "
                "shape. Leave dispatch_batches out; each process makes its own.",
                "accelerator_config",
            )
        if self.auto_find_batch_size and (self.fsdp or self.fsdp_config or self.deepspeed):
            raise ConfigError(
                "is True, and weights are sharded, so that a run cannot begin again with those of its start. Leave it "
                "out; max_tokens_per_forward bounds what is computed at once.",
                "auto_find_batch_size",
            )

    def require_streamable(self) -> None:
        """Refuse what training rows that are streamed cannot do.

        Raises:
            ConfigError: an option that needs all rows, or would do nothing.
        """
        if self.max_steps < 1:
            raise ConfigError(
                f"is {self.max_steps}, and the training rows are streamed, so that no one knows how many there are. "
                "Set how many steps the run has (the stream begins anew when it ends), or read the rows whole.",
                "max_steps",
            )
        if self.dataloader_num_workers:
            raise ConfigError(
                f"is {self.dataloader_num_workers}, and the training rows are streamed: they are prepared ahead in the "
                "background already. Set dataset_num_proc to prepare them in several processes.",
                "dataloader_num_workers",
            )

    def computes_on_cpu(self) -> bool:
        """Whether the trainer may still decide on the precision; DeepSpeed is configured with it from the start."""
        return (self.use_cpu or not torch.accelerator.is_available()) and self.deepspeed is None

    @property
    def kind(self) -> Kind:
        """What the rows mean to each other."""
        return self.objective_rows[0].kind if self.algorithm else "pair"

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares with a reference at all."""
        return any(row.needs_reference for row in self.objective_rows) if self.algorithm else True

    @property
    def objective_name(self) -> str:
        """What the objective is called, for messages."""
        return type(self).__name__

    def objective_options(self) -> dict[str, float]:
        """Options that the objective's function is called with, by name."""
        names = [name for row in self.objective_rows for name in row.defaults] if self.algorithm else []
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass
class ReferenceFreeConfig(PreferenceConfig):
    """What trainers without a reference take.

    The fields that declare a reference keep their defaults; none is loaded or run.

    Raises:
        ConfigError: a reference was asked for.
    """

    def __post_init__(self) -> None:
        asking = (field.name for field in fields(ReferenceArguments))
        self.go_without_reference(f"the objective of {type(self).__name__} compares with no reference", *asking)
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        """No."""
        return False
