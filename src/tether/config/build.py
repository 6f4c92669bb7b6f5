"""From a checked run file to what the trainer takes."""

from __future__ import annotations

import inspect
import os
import re
from typing import TYPE_CHECKING, Any

from tether.config.adapter import adapter_config
from tether.config.fields import ELSEWHERE, known_fields
from tether.config.sections import RunConfig
from tether.config.trainers import Loss, config_class, default_of, objective_arguments, own_fields, trainer_class
from tether.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig

    from tether.training import PreferenceConfig

# Pairs that are computed at once on one device where neither the run file nor a budget of tokens says how many: enough
# to keep a device busy, as pairs are packed without padding, and few enough for a small one's memory.
MICRO_BATCH = 4
_PLACES = {
    "loss": "objective.loss",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    **{name: place.strip("`") for name, place in ELSEWHERE.items() if place.startswith("`") and place.endswith("`")},
}


def build(run: RunConfig) -> tuple[PreferenceConfig, PeftConfig | None, dict[str, Any]]:
    """Make the trainer's arguments of a run; loads neither data nor a model.

    Args:
        run: a checked run file.

    Returns:
        The configuration, the adapter or None, and further keywords for the trainer of `trainer_class`.

    Raises:
        ConfigError: values that are each allowed but not together.
    """
    options = _options(run)
    keywords = {
        "model": run.model.name,
        "ref_model": run.reference.model,
        "train_dataset": run.data.train_rows,
        "eval_dataset": run.data.eval_rows,
    }
    arguments = _configuration(options, run.objective.loss)
    if "ref_model" not in inspect.signature(trainer_class(run.objective.loss)).parameters:
        del keywords["ref_model"]
    task = "SEQ_CLS" if run.objective.loss == "reward" else None
    return arguments, adapter_config(run.lora, run.peft, task=task), keywords


def split_batch(run: RunConfig, devices: int) -> tuple[int, int]:
    """Split `train.batch_size` over devices and micro-batches.

    `per_device_train_batch_size` and `gradient_accumulation_steps` are kept where they are given. Otherwise a device's
    pairs are one batch, which the trainer splits by `max_tokens_per_forward`; without that budget a batch has at most
    `MICRO_BATCH` pairs.

    Args:
        run: a checked run file.
        devices: processes that train, one a device.

    Returns:
        Pairs per batch and device, and batches per step.

    Raises:
        ConfigError: no such split exists.
    """
    further = run.train.further
    micro, steps = further.get("per_device_train_batch_size"), further.get("gradient_accumulation_steps")
    for name, value in (("per_device_train_batch_size", micro), ("gradient_accumulation_steps", steps)):
        if value is not None and value < 1:
            raise ConfigError(f"`train.{name}` is {value}; allowed is a whole number from 1.")
    if "batch_size" not in run.train.model_fields_set and (micro or steps):
        return micro or MICRO_BATCH, steps or 1
    pairs = run.train.batch_size
    said = ", ".join(
        f"{count} {what}" for count, what in ((micro, "pairs a micro-batch"), (steps, "micro-batches")) if count
    )
    unit = devices * (micro or 1) * (steps or 1)
    fitting = f"{unit}" if micro and steps else f"a multiple of {unit}"
    if pairs % unit or (micro and steps and pairs != unit):
        raise ConfigError(
            f"`train.batch_size` is {pairs} pairs per step, which {devices} {'device' if devices == 1 else 'devices'}"
            f"{f' with {said}' if said else ''} cannot make up. Set it to {fitting}"
            f"{', or leave the other keys out' if said else ''}."
        )
    share = pairs // devices
    if steps:
        micro = share // steps
    elif not micro and further.get("max_tokens_per_forward", "auto") is not None:
        micro = share
    elif not micro:
        micro = max(size for size in range(1, MICRO_BATCH + 1) if share % size == 0)
    return micro, share // micro


def _options(run: RunConfig) -> dict[str, Any]:
    # torchrun and accelerate set WORLD_SIZE; without them there is one process.
    micro, steps = split_batch(run, int(os.environ.get("WORLD_SIZE", "1")))
    options = {
        **run.train.further,
        "output_dir": run.output,
        "dataset_cache": run.data.cache or None,
        "dataset_streaming": run.data.streaming,
        "dataset_buffer_size": run.data.buffer_size,
        "num_train_epochs": run.train.epochs,
        "learning_rate": run.train.learning_rate,
        "max_length": run.train.max_length,
        "max_steps": run.train.max_steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": steps,
        **objective_arguments(run.objective),
        **_reference(run),
        **run.model.arguments,
    }
    _refuse_idle_options(run)
    return options


def _reference(run: RunConfig) -> dict[str, Any]:
    declared = run.reference
    options: dict[str, Any] = {
        # A reference that was left out stays unset: a model that Tether trained then asks which one is meant.
        "reference": declared.meaning if declared.model_fields_set - {"store", "store_dtype"} else None,
        "reference_store": declared.store,
        "reference_store_dtype": declared.store_dtype,
        "reference_adapter": declared.adapter,
        "reference_means": declared.means,
        "reference_snapshot": declared.snapshot,
        "reference_remote": declared.remote.model_dump() if declared.remote else None,
        "ref_model_init_kwargs": declared.loading() or None,
    }
    if declared.sync is not None:
        options["sync_ref_model"] = True
        options["ref_model_sync_steps"] = declared.sync.steps
        options["ref_model_mixup_alpha"] = declared.sync.alpha
    return options


def _refuse_idle_options(run: RunConfig) -> None:
    """An option that cannot take effect is an error."""
    further = run.train.further
    disabled = further.get("disable_dropout", default_of(run.objective.loss, "disable_dropout"))
    dropouts = {"lora.dropout": run.lora.dropout} if run.lora is not None else {}
    if run.peft is not None:
        dropouts = {f"peft.{name}": value for name, value in run.peft.further.items() if "dropout" in name}
    for name, rate in dropouts.items() if disabled else ():
        if not rate:
            continue
        raise ConfigError(
            f"`{name}` is {rate}, but every dropout is switched off, so that policy and "
            "reference differ by training alone. Leave it out, or set `train.disable_dropout: false`."
        )
    if "buffer_size" in run.data.model_fields_set and not run.data.streaming:
        raise ConfigError(
            f"`data.buffer_size` is {run.data.buffer_size}, but the rows are not streamed, so that all of them are "
            "shuffled. Leave it out, or set `data.streaming: true`."
        )
    if run.data.eval is None:
        for name in ("eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end"):
            if further.get(name) not in (None, False, "no"):
                raise ConfigError(
                    f"`train.{name}` is {further[name]}, but there is nothing to evaluate. Name rows in `data.eval`."
                )


def _configuration(options: dict[str, Any], loss: Loss) -> PreferenceConfig:
    try:
        return config_class(loss)(**options)
    except Exception as error:
        # transformers checks combinations and machines; the key that fails alone is the one to name.
        known = (name for name in options if name in known_fields(loss))
        culprit = next((name for name in known if _fails_alone(name, options[name], loss)), None)
        message = " ".join(str(error).split())
        if isinstance(error, ConfigError):
            raise ConfigError(_in_run_file_words(message, loss)) from error
        where = (
            f"`train.{culprit}` is {options[culprit]!r}, which" if culprit else "The keys of `train` together are what"
        )
        raise ConfigError(f"{where} the trainer's configuration refuses: {message.rstrip('.')}.") from error


def _fails_alone(name: str, value: Any, loss: Loss) -> bool:
    try:
        config_class(loss)(**{"output_dir": "unused", name: value})
    except Exception:
        return True
    return False


def _in_run_file_words(message: str, loss: Loss) -> str:
    """Names of Python fields at the front of a message as the run file writes them."""

    def rename(match: re.Match[str]) -> str:
        name = match.group()
        place = _PLACES.get(name) or (f"objective.{name}" if name in own_fields(loss) else None)
        place = place or (f"train.{name}" if name in known_fields(loss) else None)
        return f"`{place}`" if place else name

    return re.sub(r"^\w+", rename, message)
