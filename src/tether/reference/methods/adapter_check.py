"""What an adapter leaves of the start when it is switched off or another one is switched on."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn

from tether.compat.peft import values_of_few_tokens
from tether.models.adapters import rewrites_base
from tether.models.structure import adapter_tensors, trainable_tensors, unwrap


def learnt_for_some_tokens(policy: nn.Module) -> str:
    """Path of an adapter part that has learnt and acts on few tokens, which a probe may lack; empty for none."""
    for path, module in unwrap(policy).named_modules():
        if any(not torch.equal(learnt, start) for learnt, start in values_of_few_tokens(module)):
            return path
    return ""


def rewritten_base(policy: nn.Module) -> str:
    """Which adapter wrote into the base weights when it was made, in words; empty for none."""
    inner = unwrap(policy)
    configs = inner.peft_config if isinstance(inner, PeftModel) else {}
    for name, config in configs.items():
        if rewrites_base(config):
            return f"adapter {name!r} with init_lora_weights={getattr(config, 'init_lora_weights', None)!r}"
    return ""


def outside_adapters(policy: nn.Module) -> dict[str, Tensor]:
    """Trainable tensors that stay in effect while adapters are off."""
    inside = {id(tensor) for tensor in adapter_tensors(policy).values()}
    return {name: tensor for name, tensor in trainable_tensors(policy).items() if id(tensor) not in inside}


def trainable_of_adapter(policy: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Trainable tensors that belong to one adapter."""
    inside = {name: tensor for name, tensor in adapter_tensors(policy).items() if tensor.requires_grad}
    return {name: tensor for name, tensor in inside.items() if f".{adapter}." in f".{name}."}


def active_adapters(policy: nn.Module) -> str:
    """Names of the adapters in effect, for a message."""
    inner = unwrap(policy)
    names = inner.active_adapters if isinstance(inner, PeftModel) else []
    return ", ".join(repr(name) for name in names)


def some(tensors: dict[str, Tensor]) -> str:
    """How many tensors, and one of their names, for a message."""
    return f"{len(tensors)} tensors" + (f", such as {next(iter(tensors))!r}," if tensors else "")
