"""Places of accelerate that it does not document; read in accelerate 1.15.0."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import SkipBatchSampler
from accelerate.state import AcceleratorState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn

from tether.compat.launcher import OTHER_RANKS, OTHER_SIZES, RANKS, SIZES, number, processes, require_numbers
from tether.errors import ConfigError


@contextmanager
def step_incomplete(accelerator: Accelerator) -> Iterator[None]:
    """Inside, everything that asks takes a backward for one that does not end a step; DeepSpeed's engine asks.

    `accumulate` would count steps by itself; the trainer sets this too, by the same method.
    """
    state = accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        state._set_sync_gradients(before)


@contextmanager
def uneven_batches(accelerator: Accelerator) -> Iterator[None]:
    """Inside, data loaders are prepared without repeating rows; the setting is read when one is prepared."""
    settings = accelerator.dataloader_config
    before, settings.even_batches = settings.even_batches, False
    try:
        yield
    finally:
        settings.even_batches = before


def rows_of_last_round(accelerator: Accelerator) -> int | None:
    """Rows of its own that all processes have together in an epoch's last round of batches.

    None before that round, and where it is full: `remainder` is 0 then, and -1 where no one knows. The sampler that
    skips the batches of a resumed epoch has no batch size, so that its loader does not know; the one inside has.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader:
        return None
    loader: Any = state.active_dataloader
    remainder, sampler = state.remainder, getattr(loader, "batch_sampler", None)
    if remainder < 0 and isinstance(sampler, SkipBatchSampler):
        inner: Any = sampler.batch_sampler
        together = 1 if getattr(inner, "split_batches", False) else getattr(inner, "num_processes", 1)
        remainder = len(loader.dataset) % (inner.batch_size * together)
    return remainder if remainder > 0 else None


def require_launcher() -> None:
    """Refuse a number of processes in the environment where what a launcher sets beside it is missing.

    accelerate would take such a process for the first one, and fail over the address or wait for the others.

    Raises:
        ConfigError: what is missing, and what to do.
    """
    require_numbers()
    if os.environ.get("ACCELERATE_TORCH_DEVICE", "").partition(":")[0] == "meta":
        raise ConfigError(
            "ACCELERATE_TORCH_DEVICE is meta in the environment, a device on which tensors have no values. Unset it, "
            "or name one that computes."
        )
    size = next((name for name in SIZES if number(name, 1) > 1), None)
    if dist.is_initialized():
        return
    if size is None:
        _refuse_half()
        return
    count, rank = number(size, 1), next((name for name in RANKS if name in os.environ), None)
    start = "`torchrun --nproc_per_node N` or `accelerate launch`"
    if rank is None:
        raise ConfigError(
            f"{size} is {count} in the environment, and no variable such as RANK says which of them this is: this "
            f"process was not started by a launcher. Unset {size} for a run of one process, or start with {start}."
        )
    if number(rank, 0) >= count:
        raise ConfigError(
            f"{size} is {count} and {rank} is {number(rank, 0)} in the environment; ranks begin at 0, so the last one "
            f"is {count - 1}. Start the processes with {start}."
        )
    if "MASTER_ADDR" not in os.environ and not dist.is_mpi_available():
        raise ConfigError(
            f"{size} is {count} and {rank} is {os.environ[rank]} in the environment, and MASTER_ADDR, where the "
            f"processes meet, is not set. Start them with {start}, or set it; for a run of one process, unset {size}."
        )


def _refuse_half() -> None:
    """Refuse what a launcher sets beside a number of processes where that number is missing or 1."""
    above = next((name for name in (*RANKS, "LOCAL_RANK", *OTHER_RANKS) if number(name, 0) > 0), None)
    counted = any(number(name, 1) > 1 for name in OTHER_SIZES)
    if above is not None and not counted:
        raise ConfigError(
            f"{above} is {number(above, 0)} in the environment, so that other processes were started, and no variable "
            "such as WORLD_SIZE says how many: each would be a run of its own. Start them with `torchrun "
            f"--nproc_per_node N` or `accelerate launch`; for a run of one process, unset {above}."
        )
    if number("LOCAL_RANK", -1) >= 0 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            "LOCAL_RANK is 0 in the environment, as a launcher sets it, and MASTER_ADDR, where processes meet, is not "
            "set. Unset LOCAL_RANK for a run of one process, or start it with `torchrun --nproc_per_node 1`."
        )


# Ways of having several processes compute the same rows, by accelerate's names of their sizes, and why none works here.
_ROW_IS_PACKED = (
    "each process would get a piece of every row, and attention over the pieces knows the mask of one text from left "
    "to right; a packed row has a mask of its own, in which a completion sees its prompt and itself"
)
_WEIGHTS_ARE_CUT = (
    "each process would get a piece of single weights and must then compute the same rows as the others, and here "
    "every process has rows of its own and reads the output layer whole for log-probs"
)
_SPLITS = {
    "cp_size": ("context parallelism", _ROW_IS_PACKED),
    "sp_size": ("sequence parallelism", _ROW_IS_PACKED),
    "tp_size": ("tensor parallelism", _WEIGHTS_ARE_CUT),
    "pp_size": ("pipeline parallelism", _WEIGHTS_ARE_CUT),
}
_MESHES = ("dp_replicate_size", "dp_shard_size")
_INSTEAD = (
    "Leave it out: FSDP or DeepSpeed's ZeRO cut weights over the processes, activation_checkpointing and "
    "max_tokens_per_forward make long rows fit"
)


def require_whole_rows(given: Any, deepspeed: Any) -> None:
    """Refuse what has several processes compute one row together, wherever it is said.

    Args:
        given: `parallelism_config`, also as plain values.
        deepspeed: DeepSpeed's configuration, or the path of it.

    Raises:
        ConfigError: what was asked for, where, and why a run cannot do it.
    """
    for place, sizes in _said_of_splitting(given, deepspeed):
        own = place == "parallelism_config"
        field, whose = ("parallelism_config", "") if own else (None, f"{place} ")
        for name, size in sizes.items():
            if name in _SPLITS and size is not None and int(size) > 1:
                what, reason = _SPLITS[name]
                raise ConfigError(f"{whose}has {name} {size}, which is {what}: {reason}. {_INSTEAD}.", field)
        if mesh := [f"{name} {sizes[name]}" for name in _MESHES if str(sizes.get(name) or 1) != "1"]:
            raise ConfigError(
                f"{whose}has {', '.join(mesh)}: processes that share weights in groups were never proved here to give "
                "the numbers of one. Leave it out: FSDP then shards over all processes, and DDP copies to all.",
                field,
            )
        if own:
            raise ConfigError("has no size above 1, so that it would do nothing. Leave it out.", field)
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() == "true":
        raise ConfigError(
            "accelerate was told to use Megatron-LM (ACCELERATE_USE_MEGATRON_LM), which has a training loop and models "
            "of its own. Launch with FSDP or DeepSpeed, or with neither."
        )


def _said_of_splitting(given: Any, deepspeed: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Places that may ask for it, each with sizes by accelerate's names."""
    if given is not None:
        yield "parallelism_config", given if isinstance(given, dict) else vars(given)
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        names = (*_SPLITS, *_MESHES)
        said = {name: os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}") for name in names}
        yield "The environment (PARALLELISM_CONFIG_…, which accelerate's launcher sets)", said
    made = AcceleratorState._shared_state.get("parallelism_config")
    if made is not None:
        yield "The Accelerator that this script made before", vars(made)
    yield from _said_by_deepspeed(deepspeed or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))


def _said_by_deepspeed(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(config, (str, os.PathLike)) and os.path.isfile(config):
        try:
            with open(config, encoding="utf-8") as file:
                config = json.load(file)
        except (ValueError, RecursionError):  # said by transformers, with the place of the mistake
            return
    if not isinstance(config, dict):
        return
    tensor = config.get("tensor_parallel") or {}
    inference = (config.get("inference") or {}).get("tensor_parallel") or {}
    tp = max(tensor.get("autotp_size") or 1, inference.get("tp_size") or 1)
    stages = (config.get("pipeline") or {}).get("stages")
    pp = stages if isinstance(stages, int) else 1
    yield "DeepSpeed's configuration", {"tp_size": tp, "sp_size": config.get("sequence_parallel_size"), "pp_size": pp}


def begin_group_on_cpu(seconds: float) -> None:
    """Begin the group of a launched run on CPUs with its time limit, which transformers gives to accelerators alone."""
    if processes() > 1 and "RANK" in os.environ and not dist.is_initialized():
        os.environ.setdefault("MASTER_PORT", "29500")  # as accelerate does
        dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))


def plain_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, which has its groups and not what DeepSpeed adds to them."""
    return getattr(optimizer, "optimizer", optimizer)


def uses_fsdp2(accelerator: Accelerator) -> bool:
    """Whether this run cuts models by FSDP's second version."""
    return bool(accelerator.is_fsdp2)


def shard_by_fsdp2(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Cut a model as this run's policy is cut; `prepare` would take it for a second model to train, and refuse it."""
    return fsdp2_prepare_model(accelerator, model)


def stage3_settings(accelerator: Accelerator) -> dict[str, Any] | None:
    """DeepSpeed's configuration of this run with its numbers filled in; None unless it is stage 3."""
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin.deepspeed_config if plugin is not None and plugin.zero_stage == 3 else None
