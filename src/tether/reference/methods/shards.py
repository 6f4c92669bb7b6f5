"""The part of a tensor that this process holds, where FSDP2 or DeepSpeed's stage 3 has cut the policy into shards."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from tether.compat.deepspeed import (
    gather,
    gathers_itself,
    is_away,
    is_only_copy,
    is_partitioned,
    process_group,
    shard_of,
    shard_size,
    whole_shape,
    whole_size,
    without_hooks,
)
from tether.compat.torch import WRAPPER_NAMES, end_forward, kept_after_forward
from tether.errors import ReferencePolicyError
from tether.models.structure import unwrap

# What `gathered` holds whole at the time.
_GATHERED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# DeepSpeed keeps count of what it has gathered in its engine, which nothing in the model leads to. The engine holds the
# model, so that a strong reference would keep both for ever.
_ENGINES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers that a distributed run adds."""
    for part in WRAPPER_NAMES:
        name = name.replace(part, "")
    return name


def held_by(model: nn.Module, engine: nn.Module) -> None:
    """Remember which DeepSpeed engine gathers the shards of a model."""
    _ENGINES[model] = weakref.ref(engine)


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward gathers weights, so that every process must take part in each."""
    # What a forward has gathered may still be whole, see `reshard_after_forward`.
    cut = _cut_by_fsdp(model) or any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return bool(cut) or gathers_itself(unwrap(model))


def _cut_by_fsdp(model: nn.Module) -> list[FSDPModule]:
    """The modules that FSDP2 gathers, the outermost first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def local_part(parameter: Tensor) -> Tensor:
    """The values that this process holds; the parameter itself where it is whole.

    Raises:
        ReferencePolicyError: DeepSpeed has put the values on a disk, or keeps a second copy of them.
    """
    if is_away(parameter):
        if not is_only_copy(parameter):
            raise ReferencePolicyError(
                "DeepSpeed keeps the policy's shards on a disk (`offload_param` to nvme) or twice "
                "(`zero_hpz_partition_size`), where a snapshot cannot be exchanged. Leave that out of its "
                "configuration, or use a reference that needs no snapshot: an adapter (adapter_off), `ref_model`, or "
                "a filled store."
            )
        return shard_of(parameter)[: _real_numbers(parameter)]
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()


def _real_numbers(parameter: Any) -> int:
    """Numbers of this process' shard without the padding that makes DeepSpeed's shards equally long."""
    size = shard_size(parameter)
    return max(0, min(size, whole_size(parameter) - dist.get_rank(process_group(parameter)) * size))


def shard_like(values: Tensor, parameter: Any) -> Tensor:
    """This process' part of whole `values`, cut and typed like the parameter; nothing is communicated."""
    if isinstance(parameter, DTensor):
        whole = values.to(device=parameter.device, dtype=parameter.dtype)
        cut = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return cut.to_local().clone()
    if is_away(parameter):
        shard, start = local_part(parameter), dist.get_rank(process_group(parameter)) * shard_size(parameter)
        cut = values.flatten()[start : start + len(shard)]
        return cut.to(device=shard.device, dtype=shard.dtype, copy=True)
    return values.to(device=parameter.device, dtype=parameter.dtype)


def gather_shards(values: Tensor, parameter: Any) -> Tensor:
    """Whole values from this process' part of them; a collective operation for a sharded parameter."""
    if is_away(parameter):
        return _gather_flat(values, parameter)
    if not isinstance(parameter, DTensor) or values.shape == parameter.shape != parameter.to_local().shape:
        return values
    local = values.to(parameter.device)
    sharded = DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    return sharded.full_tensor()


def _gather_flat(values: Tensor, parameter: Any) -> Tensor:
    if values.shape == whole_shape(parameter) != local_part(parameter).shape:
        return values
    mine = torch.zeros(shard_size(parameter), dtype=values.dtype, device=parameter.device)
    mine[: len(values)] = values
    group = process_group(parameter)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts)[: whole_size(parameter)].view(whole_shape(parameter))


def sums(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum and norm of each tensor over all processes, float64 `[2]`; a collective operation for sharded ones."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value: Any = tensor.detach()
        if is_partitioned(tensor):
            value = shard_of(tensor)[: _real_numbers(tensor)]
        total = torch.stack(
            [value.sum(dtype=torch.float64), torch.linalg.vector_norm(value, dtype=torch.float64).square()]
        )
        found[name] = total.full_tensor() if isinstance(total, DTensor) else total
    cut = [name for name, tensor in tensors.items() if is_partitioned(tensor)]
    if cut:
        table = torch.stack([found[name] for name in cut])
        dist.all_reduce(table, group=process_group(tensors[cut[0]]))
        found |= dict(zip(cut, table, strict=True))
    return found


def release_gathered(model: nn.Module) -> None:
    """Give up what was gathered for a forward, so that parameters are shards and the next forward reads them."""
    wrapped = _cut_by_fsdp(model)
    for module in wrapped[:1]:
        # A head that is called in chunks after the forward leaves its group in the middle of one.
        end_forward(module)
    for module in wrapped:
        module.reshard()
    if gathers_itself(model):
        engine: Any = _ENGINES[model]()
        engine.empty_partition_cache()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, weights are whole on every process, and forwards without gradient need no other one.

    So each may make as many as it likes, which completions of different lengths take. Every process has to enter, in
    the same place; leaving, also by an error, waits for nobody. Between two updates only, as what a forward has kept
    for its backward is given up.

    Args:
        model: the policy; one that is not in shards, or gathered already, stays as it is.
    """
    if model in _GATHERED or not is_sharded(model):
        yield
        return
    release_gathered(model)  # what a forward has left may be from before an update
    wrapped = _cut_by_fsdp(model)
    with ExitStack() as stack:
        if wrapped:
            stack.enter_context(kept_after_forward(wrapped))
        else:
            stack.enter_context(without_hooks(_ENGINES[model]()))
        stack.callback(release_gathered, model)
        stack.callback(_GATHERED.discard, model)
        _GATHERED.add(model)
        for module in wrapped:
            module.unshard()
        if not wrapped:
            gather(list(model.parameters()))
        yield


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a CUDA device; None where it is not known."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
