"""What an adapter leaves of the start when it is switched off or another one is switched on."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from tether.models.adapters import rewrites_base
from tether.models.structure import adapter_tensors, trainable_tensors, unwrap


def learnt_for_some_tokens(policy: nn.Module) -> str:
    """Path of an adapter part that has learnt and acts on few tokens, which a probe may lack; empty for none."""
    for path, module in unwrap(policy).named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            original, active = list(module.original_module.parameters()), module.active_adapters
            pairs = [(copied, original) for name, copied in module.modules_to_save.items() if name in active]
            differs = any(
                not torch.equal(*pair) for copied, base in pairs for pair in zip(copied.parameters(), base, strict=True)
            )
        elif isinstance(module, TrainableTokensLayer):
            originals: Any = module.trainable_tokens_original
            deltas = module.trainable_tokens_delta.items()
            differs = any(not torch.equal(delta, originals[name]) for name, delta in deltas)
        elif isinstance(module, LoraEmbedding):
            differs = any(bool(module.get_delta_weight(name).any()) for name in module.active_adapters)
        else:
            continue
        if differs:
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
