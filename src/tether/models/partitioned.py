"""Weights that DeepSpeed's stage 3 keeps in shards, and how to have them whole for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from tether.compat.deepspeed import gather, gathers_itself, is_partitioned, partition
from tether.compat.transformers import loading_whole


@contextmanager
def whole_weights(*models: Any) -> Iterator[None]:
    """Inside, models that were loaded in shards are whole, and what is loaded or made is whole too.

    transformers loads in shards as soon as there is a configuration with stage 3, before there is an engine that would
    gather them for a forward. A start is looked at, hashed, given adapters and proved before the engine is made.

    Args:
        models: what is not a model, or not in shards, or gathered by an engine already, stays as it is.
    """
    mine = [model for model in models if isinstance(model, nn.Module) and not gathers_itself(model)]
    shards = list({id(p): p for model in mine for p in model.parameters() if is_partitioned(p)}.values())
    with loading_whole():
        gather(shards)
        try:
            yield
        finally:
            partition(shards)  # an adapter such as PiSSA writes into the weights


def on_whole_weights(construct: Callable[..., None]) -> Callable[..., None]:
    """Make a constructor that takes a policy and a reference model run where both are whole."""

    @wraps(construct)
    def constructor(self: Any, model: Any, ref_model: Any = None, *arguments: Any, **keywords: Any) -> None:
        with whole_weights(model, ref_model):
            construct(self, model, ref_model, *arguments, **keywords)

    return constructor
