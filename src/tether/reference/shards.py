"""The part of a tensor that this process holds, where FSDP2 has cut the policy into shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from tether.errors import ReferenceError

# What wrappers of activation checkpointing and compilation put between the names of a module and its child.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers that a distributed run adds."""
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def local_part(parameter: Tensor) -> Tensor:
    """The values that this process holds; the parameter itself where it is whole.

    Raises:
        ReferenceError: the values are partitioned by DeepSpeed's stage 3, which hides them.
    """
    if hasattr(parameter, "ds_id") and hasattr(parameter, "ds_tensor"):
        raise ReferenceError(
            "The policy is partitioned by DeepSpeed ZeRO stage 3, where a snapshot cannot be exchanged. Use ZeRO "
            "stage 2, FSDP2 or an adapter computed by adapter_off, or pass `ref_model`."
        )
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()


def shard_like(values: Tensor, parameter: Tensor) -> Tensor:
    """This process' part of whole `values`, cut and typed like the parameter; nothing is communicated."""
    if isinstance(parameter, DTensor):
        whole = values.to(device=parameter.device, dtype=parameter.dtype)
        cut = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return cut.to_local().clone()
    return values.to(device=parameter.device, dtype=parameter.dtype)


def gather_shards(values: Tensor, parameter: Tensor) -> Tensor:
    """Whole values from this process' part of them; a collective operation for a sharded parameter."""
    if not isinstance(parameter, DTensor) or values.shape == parameter.shape != parameter.to_local().shape:
        return values
    local = values.to(parameter.device)
    sharded = DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
    return sharded.full_tensor()


def drop_gathered(model: nn.Module) -> None:
    """Give up what FSDP2 has gathered for a forward, so that parameters are shards and the next forward reads them."""
    wrapped = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in wrapped[:1]:
        # A head that is called in chunks after the forward leaves its group in the middle of one; this ends it.
        module.reset_iter_state()
    for module in wrapped:
        module.reshard()


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a CUDA device; None where it is not known."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
