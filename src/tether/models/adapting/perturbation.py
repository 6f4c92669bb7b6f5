"""An adapter away from where it begins: what a proof at its zero point cannot tell, it tells there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tether.compat.peft import copied_parameters
from tether.models.fingerprint import base_tensors
from tether.models.structure import adapter_configs, unwrap

# Noise, as a share of a tensor's own size, and what a tensor of zeros gets.
_SHARE, _OF_ZEROS = 0.1, 0.02


def small_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own tensors, without copies of whole layers, which act from the start; empty without an adapter."""
    if not adapter_configs(model):
        return {}
    under = {id(tensor) for tensor in base_tensors(model).values()}
    under |= {id(tensor) for tensor in copied_parameters(unwrap(model))}
    return {
        name: parameter
        for name, parameter in unwrap(model).named_parameters()
        if id(parameter) not in under and parameter.is_floating_point()
    }


@contextmanager
def perturbed(model: nn.Module, strength: float = 1.0) -> Iterator[None]:
    """Inside, the small tensors of the model's adapters have noise on them; afterwards they are as before, bit for bit.

    The noise is the same each time, and takes nothing from the generators of the run.

    Args:
        model: with or without adapters; without, nothing changes.
        strength: of the noise; with 1 a tenth of each tensor's root mean square.
    """
    tensors = small_tensors(model)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    dice = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for tensor in tensors.values():
                size = tensor.float().square().mean().sqrt().item()
                noise = torch.randn(tensor.shape, generator=dice) * strength * (size * _SHARE or _OF_ZEROS)
                tensor.add_(noise.to(tensor.device, tensor.dtype))
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(before[name])
        torch.clear_autocast_cache()
