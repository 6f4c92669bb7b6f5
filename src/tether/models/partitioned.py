"""Weights that DeepSpeed's stage 3 keeps in shards, and how to have them whole for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers.integrations import deepspeed as integration


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed's stage 3 keeps a parameter in shards, gathered for the moment or not."""
    return getattr(parameter, "ds_tensor", None) is not None


def gathers_itself(module: nn.Module) -> bool:
    """Whether an engine of DeepSpeed's stage 3 gathers a module's weights for each forward, on all processes."""
    # The engine numbers the modules that it watches.
    return hasattr(module, "ds_id") and any(map(is_partitioned, module.parameters()))


@contextmanager
def whole_weights(*models: Any) -> Iterator[None]:
    """Inside, models that were loaded in shards are whole, and what is loaded or made is whole too.

    transformers loads in shards as soon as there is a configuration with stage 3, before there is an engine that would
    gather them for a forward. A start is looked at, hashed, given adapters and proved before the engine is made.

    Args:
        models: what is not a model, or not in shards, or gathered by an engine already, stays as it is.
    """
    mine = [model for model in models if isinstance(model, nn.Module) and not gathers_itself(model)]
    shards: Any = list({id(p): p for model in mine for p in model.parameters() if is_partitioned(p)}.values())
    settings = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        if shards:
            shards[0].all_gather(param_list=shards)
        yield
    finally:
        # Making an accelerator inside sets it again, to the same with its numbers filled in.
        if integration._hf_deepspeed_config_weak_ref is None:
            integration._hf_deepspeed_config_weak_ref = settings
        if shards:
            # An adapter such as PiSSA writes into the weights, alike on every process.
            shards[0].partition(param_list=shards, has_been_updated=True)


def on_whole_weights(construct: Callable[..., None]) -> Callable[..., None]:
    """Make a constructor that takes a policy and a reference model run where both are whole."""

    @wraps(construct)
    def constructor(self: Any, model: Any, ref_model: Any = None, *arguments: Any, **keywords: Any) -> None:
        with whole_weights(model, ref_model):
            construct(self, model, ref_model, *arguments, **keywords)

    return constructor
