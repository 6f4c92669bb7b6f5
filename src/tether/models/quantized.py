"""Quantised weights: their configuration by a short name, and what keeps them trainable on a CPU."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any, Literal

import torch

from tether.errors import ConfigError

Quantization = Literal["4bit", "8bit"]


def quantization_config(name: str, dtype: str | torch.dtype = "auto") -> Any:
    """Configuration of bitsandbytes for transformers' `quantization_config`.

    Args:
        name: `4bit` (NF4 with double quantisation) or `8bit` (LLM.int8).
        dtype: dtype that 4-bit weights are computed in; `auto`: bfloat16 on an accelerator, else float32.

    Raises:
        ConfigError: another name, or bitsandbytes is not installed.
    """
    if name not in ("4bit", "8bit"):
        raise ConfigError(f"quantization is {name!r}; allowed are 4bit and 8bit, or leave it out.")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization is {name}, which needs bitsandbytes, and it is not installed. Install it with "
            "`pip install 'tether[quantization]'`, or leave the option out."
        )
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


def keep_quantized_layout() -> None:
    """Keep bitsandbytes from repacking 4-bit weights in a forward in evaluation mode on a CPU.

    On processors with AVX512-BF16 it does so once, for inference, and the packed weights have no backward: afterwards
    gradients are missing without a word. Every pass of a reference is such a forward.
    """
    modules = sys.modules.get("bitsandbytes.nn.modules")
    if modules is not None and hasattr(modules, "has_avx512bf16"):
        modules.has_avx512bf16 = _never  # type: ignore[attr-defined]


def _never() -> bool:
    return False
