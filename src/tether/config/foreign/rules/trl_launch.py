"""How TRL's command starts processes: `num_processes`, and `accelerate_config`, by name or as a file of accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tether.config.foreign.document import read_foreign
from tether.config.foreign.draft import Draft, Source, as_number
from tether.config.foreign.rules import shared
from tether.errors import ConfigError

# The configurations that TRL ships, by name: how weights are held. All but one are for eight devices.
_NAMED: dict[str, dict[str, Any]] = {
    "single_gpu": {"distributed_type": "NO"},
    "multi_gpu": {"distributed_type": "MULTI_GPU"},
    "zero1": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}},
    "zero2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    "zero3": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "zero3_save_16bit_model": True}},
    "fsdp1": {"distributed_type": "FSDP", "fsdp_config": {}},
    "fsdp2": {"distributed_type": "FSDP", "fsdp_config": {}},
}
_DEVICES = 8
_WHOLE = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_NPU", "MULTI_XPU")
# Batches and clipping as the run has them.
_FILLED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def launch(draft: Draft, source: Source) -> None:
    """`accelerate_config` and `num_processes`."""
    count = _of_accelerate(draft, source) if source.has("accelerate_config") else 1
    if source.has("num_processes"):
        count = _whole_number(source, "num_processes", source.number("num_processes"))
        if draft.fates["num_processes"].mark != "note":
            draft.fates["num_processes"].became.append(f"--launch {count}")
    draft.processes = count


def _whole_number(source: Source, key: str, count: Any) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        source.wrong(key, count, "a whole number from 1")
    return count


def _of_accelerate(draft: Draft, source: Source) -> int:
    """What a configuration of accelerate says; returns how many processes it starts."""
    key, name = "accelerate_config", source.text("accelerate_config")
    path = Path(name).expanduser()
    given = _NAMED.get(name)
    if given is None and not path.is_file():
        source.wrong(key, name, f"{', '.join(_NAMED)}, or a file of accelerate")
    if given is None:
        try:
            given = read_foreign(path).values
        except ConfigError as error:
            source.refuse(key, f"`{key}`: {error}")
        count = _whole_number(source, key, as_number(given.get("num_processes", 1)))
    else:
        count = 1 if name == "single_gpu" else max(1, min(_DEVICES, torch.accelerator.device_count()))
    if as_number(given.get("num_machines", 1)) != 1:
        source.refuse(
            key,
            f"`{key}` is for {given['num_machines']} machines, and processes are started on this one. Start them with "
            "`torchrun --nnodes N -m tether …`, and leave it out.",
        )
    if given.get("use_cpu") is True:
        draft.set("train.use_cpu", True, key)
    _shards(draft, source, key, given)
    if not source.has("num_processes"):
        draft.fates[key].became.append(f"--launch {count}")
        if name in _NAMED and name != "single_gpu":
            draft.explain(key, f"one process for each of the {_DEVICES} devices, or as many as this machine has")
    return count


def _shards(draft: Draft, source: Source, key: str, given: dict[str, Any]) -> None:
    kind = str(given.get("distributed_type", "NO")).upper()
    if kind == "DEEPSPEED":
        settings = given.get("deepspeed_config") or {}
        draft.set("train.deepspeed", settings.get("deepspeed_config_file") or _zero(settings), key)
    elif kind == "FSDP":
        shared.sharded(draft, given.get("fsdp_config") or {}, [key])
    elif kind not in _WHOLE:
        source.refuse(key, f"`{key}` has the distributed_type {kind}; known are {', '.join(_WHOLE)}, DEEPSPEED, FSDP.")


def _zero(settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration of DeepSpeed from the words that accelerate has for it."""
    optimization: dict[str, Any] = {"stage": as_number(settings.get("zero_stage", 2))}
    for part in ("optimizer", "param"):
        device = settings.get(f"offload_{part}_device", "none")
        if device not in (None, "none"):
            optimization[f"offload_{part}"] = {"device": device}
    if settings.get("zero3_save_16bit_model"):
        optimization["stage3_gather_16bit_weights_on_model_save"] = True
    return {"zero_optimization": optimization, **dict.fromkeys(_FILLED, "auto")}
