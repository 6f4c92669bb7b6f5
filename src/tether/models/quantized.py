"""Quantised weights: their configuration by a short name, and how they are told."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from tether.compat.torch import inner_tensors
from tether.errors import ConfigError

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
    require_package(f"is {name}", _PACKAGES[name])
    return _torchao() if name == "int8" else _bitsandbytes(name, dtype)


def require_package(said: str, package: str) -> None:
    """Refuse a quantisation whose library is not there, before weights are read.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec(package) is None:
        raise ConfigError(
            f"quantization {said}, which needs {package}, and it is not installed. Install it with "
            "`pip install 'tether[quantization]'`, or leave the option out."
        )


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _bitsandbytes(name: str, dtype: str | torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype(str(dtype).removeprefix("torch."))),
    )


def compute_dtype(name: str) -> str:
    """The type that weights of 4 bits are computed in; `auto`: bfloat16 on an accelerator, else float32."""
    if name != "auto":
        return name
    return "bfloat16" if torch.accelerator.is_available() else "float32"


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether a weight is held in fewer bits than it stands for, so that no gradient can change it."""
    # torchao's tensors call themselves floating; they are made of an integer tensor and scales.
    return not parameter.is_floating_point() or bool(inner_tensors(parameter))
