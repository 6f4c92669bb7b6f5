"""Tree attention by torch's own variable-length attention: FlashAttention's kernel without another package.

The forest is told as for FlashAttention's package, see `flash.packed`. It has been run on no GPU yet; the tests
compare what is asked of the kernel with plain operations, and the proof at the start stands before every run.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tether.errors import ScoringError
from tether.scoring.attention.flash import DTYPES, packed
from tether.scoring.attention.sdpa import Options
from tether.types import Forest


def varlen_problem(device: str) -> str:
    """Why the kernel cannot run on a kind of device; empty when it can."""
    if device != "cuda":
        return f"torch's variable-length attention runs on CUDA, and the model is on {device}"
    found = find_spec("torch.nn.attention.varlen")
    return "" if found else f"torch {torch.__version__} has no variable-length attention"


def varlen_tree_attention(query: Tensor, key: Tensor, value: Tensor, forest: Forest, options: Options) -> Tensor:
    """One call for the whole row; shapes as in `tree_attention`.

    Raises:
        ScoringError: dropout, a softcap or attention sinks, or numbers of a precision that the kernel does not have.
    """
    asked = {"dropout": options.dropout, "softcap": options.softcap, "attention sinks": options.sinks is not None}
    lacking = [name for name, wanted in asked.items() if wanted]
    if lacking:
        raise ScoringError(f"torch's variable-length attention has no {lacking[0]}; use flex or sdpa.")
    if query.dtype not in DTYPES:
        raise ScoringError(
            f"torch's variable-length attention computes in float16 and bfloat16, and the model in {query.dtype}; use "
            "flex or sdpa."
        )
    output = _kernel()(
        *packed(query, key, value, forest),
        scale=options.scaling,
        # The left of the window is counted without the query itself; -1: all of it.
        window_size=(-1 if options.window is None else options.window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]


def _kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn
