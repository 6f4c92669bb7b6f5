"""A reference model of its own beside a policy in shards: cut as the policy is, so that no process holds it whole."""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerate import Accelerator, DistributedType

from tether.compat.accelerate import shard_by_fsdp2, stage3_settings, uses_fsdp2
from tether.compat.deepspeed import inference_engine
from tether.reference import Reference, live_reference
from tether.reference.methods.model import ModelReference
from tether.reference.methods.moving import MovingModelReference


def shard_reference(reference: Reference, accelerator: Accelerator) -> None:
    """Cut a reference model as this run's policy is cut; nothing for another reference, or for a run without shards.

    One that is quantised, or spread over devices by a map, stays as it was loaded.

    Args:
        reference: the resolved one, whole until now, since it was hashed and proved.
        accelerator: of the run, after the policy was prepared.
    """
    live = live_reference(reference)
    put = _shards_of(accelerator)
    # One that moves takes the policy's tensors whole.
    if put is not None and isinstance(live, ModelReference) and not isinstance(live, MovingModelReference):
        live.place(put)


def _shards_of(accelerator: Accelerator) -> Any:
    if accelerator.distributed_type == DistributedType.FSDP and uses_fsdp2(accelerator):
        return partial(shard_by_fsdp2, accelerator)
    settings = stage3_settings(accelerator) if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return None if settings is None else partial(inference_engine, config=settings)
