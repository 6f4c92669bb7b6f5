"""From a checked run file to what the trainer takes."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
from collections.abc import Sequence
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback

from tether.compat.launcher import processes
from tether.config.fields import adapter_class, config_class, fields_under, keys_of, row_of, trainer_class
from tether.config.run import Objective, RunConfig
from tether.config.sections import (
    LOADING,
    Asked,
    Callbacks,
    Judge,
    Lora,
    Model,
    Peft,
    Quantize,
    Reference,
    Rollout,
    Section,
)
from tether.errors import ConfigError
from tether.models.quantized import require_package
from tether.reference import RemoteOptions
from tether.rewards import (
    READY_MADE,
    EndpointJudge,
    FunctionJudge,
    Reward,
    as_rewards,
    judge_reward,
    python_function,
    win_rate,
)
from tether.training import OnlineConfig, PreferenceConfig
from tether.training.callbacks import WatchLoss
from tether.training.online.algorithm import as_reward_functions

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger("tether")
# Pairs that are computed at once on one device where neither the run file nor a budget of tokens says how many: enough
# to keep a device busy, as pairs are packed without padding, and few enough for a small one's memory.
MICRO_BATCH = 4
# Keys of `lora` that PEFT has under another name.
_LORA = {
    "alpha": "lora_alpha",
    "target": "target_modules",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "init": "init_lora_weights",
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
    arguments = _configuration(options, config_class(run.objective.loss))
    if "ref_model" not in inspect.signature(trainer_class(run.objective.loss)).parameters:
        del keywords["ref_model"]
    if issubclass(config_class(run.objective.loss), OnlineConfig):
        keywords["reward_funcs"] = [_reward(judge) for judge in run.rewards or ()]
    if run.callbacks is not None:
        keywords["callbacks"] = _callbacks(run.callbacks)
    task = "SEQ_CLS" if run.objective.loss == "reward" else None
    return arguments, adapter_config(run.lora, run.peft, task=task), keywords


def _callbacks(section: Callbacks) -> list[TrainerCallback]:
    stopping, watchdog = section.early_stopping, section.loss_watchdog
    made: list[TrainerCallback] = []
    if stopping is not None:
        made.append(EarlyStoppingCallback(stopping.patience, stopping.threshold))
    if watchdog is not None:
        made.append(WatchLoss(watchdog.threshold, watchdog.patience))
    return made


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
    online = issubclass(config_class(run.objective.loss), OnlineConfig)
    # Of sampled completions a batch has so many prompts, each with its group.
    group = (run.rollout or Rollout()).group if online else 1
    pairs, rows = run.train.batch_size * group, "completions" if online else "pairs"
    said = ", ".join(
        f"{count} {what}" for count, what in ((micro, f"{rows} a micro-batch"), (steps, "micro-batches")) if count
    )
    unit = devices * (micro or 1) * (steps or 1)
    prompts = unit // gcd(unit, group)  # the fewest whose completions are a multiple of the unit
    fitting = f"{prompts}" if micro and steps else f"a multiple of {prompts}"
    if pairs % unit or (micro and steps and pairs != unit):
        asked = f"{run.train.batch_size} x {group} completions" if online else f"{pairs} pairs"
        raise ConfigError(
            f"`train.batch_size` is {asked} per step, which {devices} {'device' if devices == 1 else 'devices'}"
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
    micro, steps = split_batch(run, processes())
    options = {
        **run.train.further,
        "output_dir": run.output,
        **_under("train", run.train),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": steps,
        **_under("data", run.data),
        "dataset_cache": run.data.cache or None,
        **objective_arguments(run.objective),
        **_reference(run.reference),
        **_model(run.model),
    }
    if run.callbacks is not None and run.callbacks.early_stopping is not None:
        if options.get("eval_strategy", "no") in ("no", False):
            raise ConfigError("`callbacks.early_stopping` is given, and `train.eval_strategy` is no. Set it to steps.")
        options.setdefault("metric_for_best_model", "loss")
    options = _online(run, options)
    _refuse_idle_options(run)
    return options if processes() > 1 else _unsharded(options)


def _unsharded(options: dict[str, Any]) -> dict[str, Any]:
    """The options of one process, which has nobody to share weights with: FSDP waits for several, and DeepSpeed is
    not needed where it is not installed and would only share."""
    idle = [name for name in ("fsdp", "fsdp_config") if options.get(name)]
    settings = options.get("deepspeed")
    if settings and importlib.util.find_spec("deepspeed") is None and not _offloads(settings):
        idle.append("deepspeed")
    if idle:
        logger.info(
            f"{idle[0]}: this is one process, which holds the whole model. `--launch N` starts several, that share it"
        )
    return {name: value for name, value in options.items() if name not in idle}


def _offloads(settings: Any) -> bool:
    """Whether a configuration of DeepSpeed moves tensors off the device, which one process can do too.

    Raises:
        ConfigError: it is a file that cannot be read.
    """
    if isinstance(settings, str):
        try:
            settings = json.loads(Path(settings).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"`train.deepspeed` is '{settings}', which cannot be read ({error}). Name a JSON file, or leave it out."
            ) from error
    optimization = settings.get("zero_optimization") or {}
    parts = (optimization.get(f"offload_{part}") or {} for part in ("optimizer", "param"))
    return any(part.get("device", "none") != "none" for part in parts)


def objective_arguments(objective: Objective) -> dict[str, Any]:
    """The section as arguments of the trainer's configuration."""
    fields, row = fields_under("objective", config_class(objective.loss)), row_of(objective.loss)
    found = {name: objective.further[key] for key, name in fields.items() if key in objective.further}
    if "loss" in fields:
        found["loss_type"] = row.name if row else objective.loss
    return found


def _online(run: RunConfig, options: dict[str, Any]) -> dict[str, Any]:
    """The options with those of rollouts and rewards, which belong to losses of sampled completions and to no others.

    Raises:
        ConfigError: they came with another loss, or rewards are missing.
    """
    loss = run.objective.loss
    if not issubclass(config_class(loss), OnlineConfig):
        given = [name for name in ("rewards", "rollout") if getattr(run, name) is not None]
        if given:
            raise ConfigError(
                f"`{given[0]}` was given with loss {loss!r}, whose rows have completions already. Leave it out, or "
                "take a loss of sampled completions, such as dapo."
            )
        return options
    if run.rewards is None:
        raise ConfigError(f"`rewards` is missing: loss {loss!r} samples completions, and something must judge them.")
    if "max_length" in run.train.model_fields_set:
        raise ConfigError(
            "`train.max_length` is said by `rollout.max_prompt` and `rollout.max_tokens` for sampled completions. "
            "Write it there."
        )
    del options["max_length"]
    section = run.rollout or Rollout()
    asked = section.model_fields_set | {"group"}
    fields = {key: field for key, field in fields_under("rollout", OnlineConfig).items() if key in asked}
    rollout = {field: getattr(section, key) for key, field in fields.items()}
    return {**options, **rollout, "reward_weights": [judge.weight for judge in run.rewards]}


def rewards_of(judges: Sequence[Judge]) -> tuple[Reward, ...]:
    """The reward functions of a list of entries, with names and weights."""
    functions = as_reward_functions([_reward(judge) for judge in judges])
    return as_rewards(functions, [judge.weight for judge in judges])


def _reward(judge: Judge) -> Any:
    """The reward function of an entry of `rewards`.

    Raises:
        ConfigError: no ready-made one has that name, or it does not take an option.
    """
    if judge.python is not None:
        return python_function(judge.python)
    if isinstance(judge.judge, Asked):
        said = judge.judge.model_dump()
        by, instructions, most = (said.pop(name) for name in ("by", "instructions", "max_tokens"))
        asked = EndpointJudge(RemoteOptions(**said), instructions, most)
        return judge_reward(asked) if by == "rating" else win_rate(asked)
    if judge.judge is not None:
        return win_rate(FunctionJudge(python_function(judge.judge, "a judge")))
    if judge.name is None:
        return judge.model
    if judge.name not in READY_MADE:
        raise ConfigError(f"`rewards` has the name {judge.name!r}; ready-made are {', '.join(READY_MADE)}.")
    make = READY_MADE[judge.name]
    try:
        inspect.signature(make).bind(**judge.further)
    except TypeError as error:
        takes = ", ".join(inspect.signature(make).parameters) or "none"
        raise ConfigError(
            f"The reward {judge.name!r} got the options {judge.further} and takes {takes}: {error}."
        ) from error
    return make(**judge.further)


def _under(name: str, section: Section) -> dict[str, Any]:
    """Values of the keys of a section that stand for one field each, by the field."""
    fields = fields_under(name, PreferenceConfig).items()
    values = {field: getattr(section, key) for key, field in fields if key in type(section).model_fields}
    return {
        field: value.model_dump(exclude_defaults=True) if isinstance(value, Section) else value
        for field, value in values.items()
    }


def _model(model: Model) -> dict[str, Any]:
    loading = {keyword: getattr(model, name) for name, keyword in LOADING.items()}
    if isinstance(model.quantization, Quantize):
        require_package("has details of 4 bits", "bitsandbytes")
        loading |= {"quantization": None, "quantization_config": model.quantization.options()}
    return {
        "model_init_kwargs": {keyword: value for keyword, value in loading.items() if value not in (None, False)},
        **_under("model", model),
        # Of the configuration it would let the reference's repository run code too; above it is the policy's alone.
        "trust_remote_code": False,
    }


def _reference(declared: Reference) -> dict[str, Any]:
    loading = {LOADING[name]: value for name, value in declared.loading().items()}
    options: dict[str, Any] = {
        **_under("reference", declared),
        # A reference that was left out stays unset: a model that Tether trained then asks which one is meant.
        "reference": declared.meaning if declared.model_fields_set - {"store", "store_dtype"} else None,
        "reference_remote": declared.remote.model_dump() if declared.remote else None,
        "ref_model_init_kwargs": loading or None,
        "sync_ref_model": declared.sync is not None,
    }
    if declared.sync is not None:
        options |= _under("reference.sync", declared.sync)
    return options


def _refuse_idle_options(run: RunConfig) -> None:
    """An option that cannot take effect is an error."""
    further = run.train.further
    fields = config_class(run.objective.loss).__dataclass_fields__
    disabled = further.get("disable_dropout", fields["disable_dropout"].default)
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
    if run.data.eval is None and run.callbacks is not None and run.callbacks.early_stopping is not None:
        raise ConfigError("`callbacks.early_stopping` is given, but there is nothing to evaluate. Name `data.eval`.")
    if run.data.eval is None:
        for name in ("eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end"):
            if further.get(name) not in (None, False, "no"):
                raise ConfigError(
                    f"`train.{name}` is {further[name]}, but there is nothing to evaluate. Name rows in `data.eval`."
                )


def _configuration(options: dict[str, Any], config: type[PreferenceConfig]) -> PreferenceConfig:
    try:
        return config(**options)
    except ConfigError as error:
        if error.field is None:
            raise
        key = keys_of(config).get(error.field, error.field)
        raise ConfigError(f"`{key}` {error.words}") from error
    except Exception as error:
        # transformers checks combinations and machines, and names its own fields in what it says.
        message = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"The trainer's configuration refuses the keys of `train` together: {message}.") from error


def adapter_config(lora: Lora | None, peft: Peft | None, *, task: str | None) -> PeftConfig | None:
    """The configuration of a new adapter; None for none.

    Args:
        lora: the section `lora`.
        peft: the section `peft`.
        task: PEFT's name of what the model does; None: as the model's class says.

    Raises:
        ConfigError: PEFT refuses the values together.
    """
    if peft is not None:
        try:
            return adapter_class(peft.type)(task_type=task, **peft.further)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"`peft` is what PEFT refuses: {' '.join(str(error).split())}") from error
    if lora is None:
        return None
    keywords = {_LORA.get(name, name): value for name, value in lora}
    return adapter_class("lora")(task_type=task, **keywords)
