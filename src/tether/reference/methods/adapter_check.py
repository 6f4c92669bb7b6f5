"""What an adapter leaves of the start when it is switched off or another one is switched on."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from tether.compat.peft import layer_under, tuner_layers, values_of_few_tokens
from tether.models.adapters import rewrites_base
from tether.models.adapting.perturbation import perturbed
from tether.models.fingerprint import model_fingerprint
from tether.models.structure import (
    adapter_configs,
    adapter_tensors,
    adapters_off,
    dtype_of,
    evaluation_mode,
    trainable_tensors,
    unwrap,
)

# Tokens that a layer is called with by itself.
_FEW = 8
# Roundings by which two right computations of a layer may differ: a rotation by the identity is not exact. In half
# precision that many would be half of an output.
_ROUNDINGS, _OF_HALF = 64, 8
# How much stronger noise must be there to be seen above them.
_LOUDER = 100.0


def learnt_for_some_tokens(policy: nn.Module) -> str:
    """Path of an adapter part that has learnt and acts on few tokens, which a probe may lack; empty for none."""
    for path, module in unwrap(policy).named_modules():
        if any(not torch.equal(learnt, start) for learnt, start in values_of_few_tokens(module)):
            return path
    return ""


def acting_layer(policy: nn.Module) -> str:
    """Why the adapters in effect are not nothing at all, in words; empty where they are, on whatever row.

    A probe has few rows, and an adapter may act on others. So each adapted layer is called by itself: with its
    adapter, without, and with the adapter perturbed. A layer that is the same with and without holds nothing yet, if
    the perturbed one differs; if that does not differ either, the adapter acts by what the layer alone is not told.
    """
    layers = dict(tuner_layers(unwrap(policy)))
    if not layers:
        return "the adapter acts in no single layer" if adapter_configs(policy) else ""
    # What acts on few tokens is judged by its values, see `learnt_for_some_tokens`.
    layers = {path: layer for path, layer in layers.items() if next(values_of_few_tokens(layer), None) is None}
    inputs = {path: _inputs(layer, dtype_of(policy)) for path, layer in layers.items()}
    with torch.no_grad(), evaluation_mode(policy):
        now = {path: _output(layer, inputs[path]) for path, layer in layers.items()}
        with adapters_off(policy):
            without = {path: _output(layer, inputs[path]) for path, layer in layers.items()}
        with perturbed(policy, _LOUDER if _is_half(dtype_of(policy)) else 1.0):
            moved = {path: _output(layer, inputs[path]) for path, layer in layers.items()}
    unmoved = ""
    for path, layer in layers.items():
        first, second, third = now[path], without[path], moved[path]
        if first is None or second is None or third is None:
            if not _adds_nothing(layer):
                return f"the adapter on {path!r} already holds something, or cannot be seen in that layer alone"
        elif _differ(first, second):
            return f"the adapter on {path!r} already holds something"
        elif not _differ(third, second) and _in_effect(layer):
            unmoved = unmoved or f"the adapter on {path!r} acts by what is in a row, not on each token alike"
    return unmoved


def _in_effect(layer: Any) -> bool:
    held = {name for kept in layer.adapter_layer_names for name in getattr(getattr(layer, kept, None), "keys", dict)()}
    return bool(held & set(layer.active_adapters)) and not layer.disable_adapters


def _inputs(layer: Any, dtype: torch.dtype) -> Tensor | None:
    """A few random inputs of an adapted layer; None where what it takes is not known."""
    plain: Any = layer_under(layer)
    weight = next(plain.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    if isinstance(plain, nn.Embedding):
        return torch.arange(min(_FEW, plain.num_embeddings), device=device)[None]
    width = getattr(plain, "in_features", None) or getattr(layer, "in_features", None)
    width = weight.shape[-1] if width is None and weight is not None and weight.dim() == 1 else width
    if not isinstance(width, int):
        return None
    inputs = torch.randn(1, _FEW, width, generator=torch.Generator().manual_seed(0))
    kept = dtype if weight is None or not weight.is_floating_point() else weight.dtype
    return inputs.to(device, kept)


def _output(layer: nn.Module, inputs: Tensor | None) -> Tensor | None:
    """What a layer makes of inputs; None where it cannot be called with them alone."""
    if inputs is None:
        return None
    try:
        found = layer(inputs)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
        return None
    return found if isinstance(found, Tensor) else None


def _differ(first: Tensor, second: Tensor) -> bool:
    """Whether two outputs differ by more than a different order of the same sums explains."""
    if first.shape != second.shape:
        return True
    size, roundings = second.abs().max().item(), _OF_HALF if _is_half(second.dtype) else _ROUNDINGS
    return not (first - second).abs().max().item() <= roundings * torch.finfo(second.dtype).eps * max(size, 1e-30)


def _is_half(dtype: torch.dtype) -> bool:
    return torch.finfo(dtype).bits < 32


def _adds_nothing(layer: Any) -> bool:
    """Whether what every active adapter would add to the weights of a layer that cannot be called alone is zero."""
    try:
        return all(not layer.get_delta_weight(name).any() for name in layer.active_adapters)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, NotImplementedError):
        return False


def rewritten_base(policy: nn.Module, source: str | None) -> str:
    """What of the weights under the adapters is not the base, in words; empty where nothing is.

    Args:
        policy: with its adapters.
        source: fingerprint of the base as its source has it; None where there is no source to compare with.
    """
    configs = adapter_configs(policy)
    names = ", ".join(
        f"{name!r}" + (f" with init_lora_weights={init!r}" if isinstance(init, str) else "")
        for name, config in configs.items()
        for init in [getattr(config, "init_lora_weights", None)]
    )
    if source is not None:
        changed = model_fingerprint(unwrap(policy), without_adapters=True) != source
        return f"adapter {names or 'none'} or something else" if changed else ""
    return f"adapter {names}" if any(map(rewrites_base, configs.values())) else ""


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
