"""How the processes of tests hold a model: whole, or in shards by FSDP2 or DeepSpeed; and how they end."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from tether import DPOTrainer
from tether.compat.deepspeed import is_partitioned
from tether.reference.methods.shards import release_gathered

_WRAP = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def settings(how: str) -> dict[str, Any]:
    """Arguments of a run that holds its model `whole`, in DDP, or by `fsdp`, `zero2`, `zero3`."""
    let_accelerate_shard_on_cpu()
    choices = {
        "whole": {},
        "accumulated": {},
        "ddp": {},
        "fsdp": {"fsdp": True, "fsdp_config": _WRAP},
        "zero2": _zero(2),
        "zero3": _zero(3),
    }
    return dict(choices[how])


def _zero(stage: int) -> dict[str, Any]:
    # Tensors of fewer numbers than this stay whole on each process: here the norms, and none of the matrices.
    optimization = {"stage": stage, "stage3_param_persistence_threshold": 100}
    optimization["stage3_gather_16bit_weights_on_model_save"] = True
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    # Without an optimizer: the trainer's own is used, while each of DeepSpeed's would be compiled first.
    return {"deepspeed": {"zero_optimization": optimization, **dict.fromkeys(names, "auto")}}


def let_accelerate_shard_on_cpu() -> None:
    """Accelerate ignores FSDP2 where processes are on CPUs; here the type is set as it is for accelerators."""
    original = AcceleratorState.__init__
    if original.__module__ == __name__:
        return

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            # Every later state takes the type from the partial one.
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def is_held(trainer: DPOTrainer, how: str) -> bool:
    """Whether the policy is held as `how` says."""
    release_gathered(trainer.policy)
    parameters = list(trainer.policy.parameters())
    if how in ("fsdp", "zero3"):
        return all(isinstance(one, DTensor) if how == "fsdp" else is_partitioned(one) for one in parameters)
    wrapper = {"zero2": "DeepSpeedEngine", "ddp": "DistributedDataParallel"}
    return type(trainer.model_wrapped).__name__ == wrapper.get(how, type(trainer.model).__name__)


def finish() -> None:
    """End a process of several: gloo's threads sometimes abort one that ends in the ordinary way."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        os._exit(0)
