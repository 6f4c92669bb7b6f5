"""Quantised weights: their configuration by a short name, and what keeps them trainable on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from tether.errors import ConfigError

Quantization = Literal["4bit", "nf4", "8bit", "int8", "none"]
# Short name to the package that it needs.
_PACKAGES = {"4bit": "bitsandbytes", "nf4": "bitsandbytes", "8bit": "bitsandbytes", "int8": "torchao"}


def quantization_config(name: str, dtype: str | torch.dtype = "auto") -> Any:
    """Configuration for transformers' `quantization_config`, by a short name.

    Args:
        name: `4bit` or `nf4` (bitsandbytes' NF4 with double quantisation), `8bit` (bitsandbytes' LLM.int8), `int8`
            (torchao, weights only, in one scale for each output), or `none`.
        dtype: dtype that 4-bit weights are computed in; `auto`: bfloat16 on an accelerator, else float32.

    Returns:
        The configuration; None for `none`.

    Raises:
        ConfigError: another name, or the package that it needs is not installed.
    """
    if name == "none":
        return None
    if name not in _PACKAGES:
        raise ConfigError(f"quantization is {name!r}; allowed are {', '.join(_PACKAGES)} and none, or leave it out.")
    if find_spec(_PACKAGES[name]) is None:
        raise ConfigError(
            f"quantization is {name}, which needs {_PACKAGES[name]}, and it is not installed. Install it with "
            "`pip install 'tether[quantization]'`, or leave the option out."
        )
    return _torchao() if name == "int8" else _bitsandbytes(name, dtype)


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _bitsandbytes(name: str, dtype: str | torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    chosen = str(dtype).removeprefix("torch.")
    if chosen == "auto":
        chosen = "bfloat16" if torch.accelerator.is_available() else "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, chosen),
    )


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether a weight is held in fewer bits than it stands for, so that no gradient can change it."""
    # torchao's tensors call themselves floating; they are made of an integer tensor and scales.
    return not parameter.is_floating_point() or hasattr(parameter, "__tensor_flatten__")


def keep_quantized_layout(model: nn.Module) -> None:
    """Make bitsandbytes compute on a CPU what it computes in training mode, in evaluation mode too.

    Two of its short cuts for inference are wrong beside training, where every pass of a reference is a forward in
    evaluation mode between two of training. On processors with AVX512-BF16 it repacks 4-bit weights in the first such
    forward, and the packed ones have no backward: gradients are missing from then on without a word. And 8-bit layers
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
    def multiply(values: torch.Tensor, *args: Any, state: Any = None, **kwargs: Any) -> Any:
        if state is not None and values.device.type == "cpu":
            state.is_training = True
        return matmul(values, *args, state=state, **kwargs)

    multiply.in_both_modes = True  # type: ignore[attr-defined]
    return multiply
