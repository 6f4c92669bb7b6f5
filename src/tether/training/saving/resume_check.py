"""What a resumed run must have as it was: rows, seed, objective, schedule, adapter; else it is another run (INV-46)."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import nn

from tether.data.prepare.cache import rows_digest
from tether.errors import ConfigError
from tether.models.structure import unwrap
from tether.training.config import PreferenceConfig
from tether.training.setup.run import Run

logger = logging.getLogger("tether")
IDENTITY = "resume.json"
# Of transformers' arguments, those that decide what a step computes and which rows it has.
_STEPS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
    "optim_target_modules",
    "seed",
    "data_seed",
    "neftune_noise_alpha",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "label_smoothing_factor",
)
# Of the options that only an algorithm has, all but those that say where things lie or how fast they go, and those that
# are proved by other means: the reference by its record, a stream and rollouts by their position.
_FREE = ("reference", "ref_model", "dataset_", "precompute_", "stream_", "model_init", "sync_ref", "vllm", "rollout")
_FREE_NAMES = (
    "cpu_matmul",
    "cpu_threads",
    "remove_unused_columns",
    "logging_nan_inf_filter",
    "trust_remote_code",
    "scoring_layout",
    "max_tokens_per_forward",
    "attention_backend",
    # How rewards are waited for and what is shown of completions; a call that failed may be given more time.
    *("reward_timeout", "reward_on_error", "log_completions", "num_completions_to_print", "log_unique_prompts"),
    *("keep_rollouts", "num_generations_eval"),
)
# Of what the names above leave free, what a loss is computed with.
_BOUND = ("vllm_importance",)
# These may grow: a finished run is lengthened so. It is said, as a schedule that ends there has another course.
_LENGTH = ("max_steps", "num_train_epochs")


def identity_of(run: Run, args: PreferenceConfig, policy: nn.Module) -> dict[str, Any]:
    """What decides the rest of a run, by name, as JSON has it.

    Args:
        run: with its training rows; a stream's are proved by its position.
        args: of the run.
        policy: whose adapters are described.
    """
    common = {field.name for field in dataclasses.fields(super_of(type(args)))}
    own = [field.name for field in dataclasses.fields(args) if field.name not in common]
    free = [name for name in own if name.startswith(_FREE) or name in _FREE_NAMES]
    names = [name for name in own if name not in free or name.startswith(_BOUND)]
    found = {name: getattr(args, name, None) for name in (*_STEPS, *_LENGTH, *names)}
    known = run.source.known
    rows = rows_digest(known) if run.source.complete and isinstance(known, Dataset) else None
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    algorithm = type(run.algorithm).__name__
    whole = {**found, "rows": rows, "rows of a step": batch, "algorithm": algorithm, "adapters": _adapters(policy)}
    return json.loads(json.dumps(whole, default=_plain, sort_keys=True))


def super_of(kind: type) -> type:
    """transformers' class of arguments under a configuration."""
    return next(one for one in kind.__mro__ if one.__module__.startswith("transformers."))


def write_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Keep it in a checkpoint."""
    (folder / IDENTITY).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")


def require_same_run(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse to go on as another run; a longer one is said.

    Args:
        folder: the checkpoint.
        identity: of the run that resumes.

    Raises:
        ConfigError: with the names and both values.
    """
    before: dict[str, Any] = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    if identity["rows"] is None:  # a stream, which finds its own place or refuses
        before = {**before, "rows": None}
    changed = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
    longer = [_said(name, before, identity) for name in changed if name in _LENGTH]
    if longer:
        logger.warning(
            f"resuming with {' and '.join(longer)}: a learning-rate schedule that depends on it goes on as if it had "
            "been so from the start"
        )
    other = [_said(name, before, identity) for name in changed if name not in _LENGTH]
    if other:
        raise ConfigError(
            f"The run of {folder} is resumed with {'; '.join(other)}. The rest would be another run than the one that "
            "began. Give what it began with; to train on with other settings, start a new run from the saved model."
        )


def _said(name: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    if name == "rows":
        return "other training rows"
    if name == "adapters":
        return "; ".join(_adapters_said(before.get(name) or {}, now.get(name) or {}))
    return f"{name} {json.dumps(now.get(name))} in place of {json.dumps(before.get(name))}"


def _adapters_said(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs of the adapters alone: a configuration has dozens of settings."""
    if before.keys() != now.keys():
        names = [", ".join(map(repr, one)) or "none" for one in (now, before)]
        yield f"adapters {names[0]} in place of {names[1]}"
    for adapter in before.keys() & now.keys():
        was, own = before[adapter], now[adapter]
        for name in sorted(was.keys() | own.keys()):
            if was.get(name) != own.get(name):
                yield (
                    f"{name} {json.dumps(own.get(name))} of the adapter {adapter!r} in place of "
                    f"{json.dumps(was.get(name))}"
                )


def _adapters(policy: nn.Module) -> dict[str, Any] | None:
    inner = unwrap(policy)
    if not isinstance(inner, PeftModel):
        return None
    # Where the base lies and which version wrote it say nothing of what trains.
    left_out = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
    return {
        name: {key: value for key, value in config.to_dict().items() if key not in left_out}
        for name, config in inner.peft_config.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return value.value if hasattr(value, "value") else str(value)
