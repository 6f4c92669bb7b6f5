"""Places of bitsandbytes that it does not document; read in bitsandbytes 0.50.2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn


def keep_quantized_layout(model: nn.Module) -> None:
    """Make bitsandbytes compute on a CPU what it computes in training mode, in evaluation mode too.

    Two of its short cuts for inference are wrong beside training, where every pass of a reference is a forward in
    evaluation mode between two of training. On processors with AVX512-BF16 it repacks 4-bit weights in the first such
    forward, and the packed ones have no backward: gradients are missing from then on silently. And 8-bit layers
    take another kernel, so that the policy is not at its own start.

    Args:
        model: its 4-bit layers are kept as they are, and brought back if whoever loaded it has had them repacked.
    """
    package = sys.modules.get("bitsandbytes")
    if package is None:
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # which brings them back, since they are saved as they were
    if not hasattr(package.matmul, "in_both_modes"):
        package.matmul = _in_both_modes(package.matmul)  # type: ignore[attr-defined]


def _in_both_modes(matmul: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(matmul)
    def multiply(values: torch.Tensor, *args: Any, state: Any = None, **kwargs: Any) -> Any:
        if state is not None and values.device.type == "cpu":
            state.is_training = True
        return matmul(values, *args, state=state, **kwargs)

    multiply.in_both_modes = True  # type: ignore[attr-defined]
    return multiply
