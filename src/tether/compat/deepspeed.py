"""What DeepSpeed's stage 3 notes on parameters and modules, none of it documented; read in deepspeed 0.19.8.

A parameter in shards has `ds_tensor`, this process' shard, with padding that makes all shards equally long. Nothing
here imports DeepSpeed but `inference_engine`: whoever trains with it has it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed's stage 3 keeps a parameter in shards, gathered for the moment or not."""
    return getattr(parameter, "ds_tensor", None) is not None


def is_away(parameter: Any) -> bool:
    """Whether a parameter is in shards and not gathered, so that it looks empty."""
    return is_partitioned(parameter) and parameter.ds_status.name != "AVAILABLE"


def gathers_itself(module: nn.Module) -> bool:
    """Whether an engine of DeepSpeed's stage 3 gathers a module's weights for each forward, on all processes."""
    # The engine numbers the modules that it watches.
    return hasattr(module, "ds_id") and any(map(is_partitioned, module.parameters()))


def whole_size(parameter: Any) -> int:
    """Numbers in a parameter over all processes."""
    return parameter.ds_numel if is_partitioned(parameter) else parameter.numel()


def whole_shape(parameter: Any) -> torch.Size:
    """Shape of a parameter in shards, once it is gathered."""
    return parameter.ds_shape


def shard_of(parameter: Any) -> Tensor:
    """This process' shard of a parameter, with its padding."""
    return parameter.ds_tensor.detach()


def shard_size(parameter: Any) -> int:
    """Numbers in each process' shard of a parameter, padding included."""
    return parameter.ds_tensor.ds_numel


def is_only_copy(parameter: Any) -> bool:
    """Whether this process' shard is in memory, and not kept a second time (`zero_hpz_partition_size`)."""
    return parameter.ds_tensor.status.name == "AVAILABLE" and getattr(parameter, "ds_secondary_tensor", None) is None


def process_group(parameter: Any) -> Any:
    """The processes that have the shards of a parameter."""
    return parameter.ds_process_group


def gather(parameters: list[Any]) -> None:
    """Make parameters whole on every process, until `partition`."""
    if parameters:
        parameters[0].all_gather(param_list=parameters)


def partition(parameters: list[Any]) -> None:
    """Cut parameters into shards again, with what was written into them meanwhile, alike on every process."""
    if parameters:
        parameters[0].partition(param_list=parameters, has_been_updated=True)


@contextmanager
def without_hooks(engine: Any) -> Iterator[None]:
    """Inside, an engine of stage 3 neither gathers nor cuts, nor takes note of forwards, which it holds to be equally
    many and alike on all processes.
    """
    offload = engine.optimizer.parameter_offload
    taken = [
        (hooks, handle.id, hooks.pop(handle.id))
        for handle in (offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks)
        if (hooks := handle.hooks_dict_ref()) is not None
    ]
    try:
        yield
    finally:
        for hooks, number, hook in taken:
            hooks[number] = hook


def parameter_groups(optimizer: Any) -> list[list[Tensor]]:
    """The parameters behind the flat partitions that DeepSpeed's optimizers step; empty for any other optimizer."""
    return [*getattr(optimizer, "bit16_groups", ()), *getattr(optimizer, "fp16_groups", ())]


def inference_engine(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """An engine without an optimizer, which gathers the weights of a layer for its forward.

    Args:
        model: cut into shards.
        config: of the run that the model takes part in.
    """
    own = {name: value for name, value in deepcopy(config).items() if name not in ("optimizer", "scheduler")}
    own["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = importlib.import_module("deepspeed").initialize(model=model, config=own)
    engine.eval()
    return engine
