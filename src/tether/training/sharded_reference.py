"""A reference model of its own beside a policy in shards: cut as the policy is, so that no process holds it whole."""

from __future__ import annotations

import importlib
from copy import deepcopy
from functools import partial
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn

from tether.reference import Reference, live_reference
from tether.reference.methods.model import ModelReference
from tether.reference.methods.moving import MovingModelReference

# What only a model in training needs.
_OF_TRAINING = ("optimizer", "scheduler")


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
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.is_fsdp2:
        return partial(fsdp2_prepare_model, accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin: Any = accelerator.state.deepspeed_plugin
        return partial(_by_deepspeed, plugin.deepspeed_config) if plugin.zero_stage == 3 else None
    return None


def _by_deepspeed(config: dict[str, Any], model: nn.Module) -> nn.Module:
    """An engine of its own without an optimizer, which gathers the weights of a layer for its forward."""
    own = {name: value for name, value in deepcopy(config).items() if name not in _OF_TRAINING}
    own["zero_optimization"].pop("offload_optimizer", None)
    # Not a dependency: whoever trains with it has it.
    engine, *_ = importlib.import_module("deepspeed").initialize(model=model, config=own)
    engine.eval()
    return engine
