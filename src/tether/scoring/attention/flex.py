"""Tree attention by FlexAttention: one fused kernel over the whole row, its block mask built once per micro-batch.

The first choice on CUDA. On a CPU it has a forward only, in plain operations, which the tests compare with the
segmented form.

Reference:
    Dong et al., Flex Attention: A Programming Model for Generating Optimized Attention Kernels, arXiv:2412.05496.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from tether.compat.messages import FLEX_UNCOMPILED
from tether.errors import ScoringError
from tether.scoring.attention.sdpa import Options
from tether.types import Forest

# Tokens of a block of the kernel, and of its mask.
_BLOCK = 128


def flex_tree_attention(query: Tensor, key: Tensor, value: Tensor, forest: Forest, options: Options) -> Tensor:
    """One call for the whole row; shapes as in `tree_attention`.

    Raises:
        ScoringError: dropout, which the kernel does not have, or gradients on a CPU.
    """
    if options.dropout:
        raise ScoringError(f"FlexAttention has no dropout, and the model asks for {options.dropout}; use sdpa.")
    on_cpu = query.device.type == "cpu"
    if on_cpu and any(tensor.requires_grad for tensor in (query, key, value)):
        raise ScoringError("FlexAttention has no backward on a CPU; use sdpa.")
    length = query.shape[2]
    # Rows of one length for the kernel: it is compiled for whole blocks, and for lengths that are not whole, again.
    room = rounded(length) - length
    query, key, value = (functional.pad(one, (0, 0, 0, room)) for one in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):
        # The kernel shares keys among a power of two of query heads only.
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    arguments: dict[str, Any] = {
        "block_mask": block_mask(forest, options.window, query.device),
        "score_mod": None if options.softcap is None else _softcapped(options.softcap),
        "scale": options.scaling,
        "enable_gqa": groups > 1,
        "return_aux": None if options.sinks is None else AuxRequest(lse=True),
    }
    found: Any = (
        _in_plain_operations(query, key, value, arguments) if on_cpu else _kernel()(query, key, value, **arguments)
    )
    if options.sinks is not None:
        output, aux = found
        # A sink only adds to the softmax's denominator: exp(lse) / (exp(lse) + exp(sink)) of the output remains.
        share = torch.sigmoid(aux.lse - options.sinks.float()[None, :, None])
        found = output * share[..., None].to(output.dtype)
    return found[:, :, :length].transpose(1, 2)


def rounded(length: int) -> int:
    """The tokens of a row with those that fill its last block."""
    return -(-length // _BLOCK) * _BLOCK


@cache
def _kernel() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _in_plain_operations(query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        # It warns that this form materialises the scores; compiling for a CPU takes most of a minute for each shape.
        warnings.filterwarnings("ignore", FLEX_UNCOMPILED)
        return flex_attention(query, key, value, **arguments)


@cache
def _softcapped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def block_mask(forest: Forest, window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries sees; kept in the forest's cache, one for each window."""
    slot = ("flex", window, device)
    if slot not in forest.cache:
        segment, trunk, position = _token_tables(forest, device)

        def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            related = (segment[q] == segment[k]) | (trunk[q] == segment[k])
            seen = (q >= k) & related
            return seen if window is None else seen & (position[q] - position[k] < window)

        length = rounded(forest.length)
        # Compiled, it computes blocks and never holds a T x T mask.
        forest.cache[slot] = create_block_mask(
            sees, None, None, length, length, device=device, _compile=device.type != "cpu"
        )
    return forest.cache[slot]


def _token_tables(forest: Forest, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """int64 `[rounded T]` each: a token's segment, its tree's trunk as a segment, its position in its sequence."""
    segments, trunks, positions, lengths = [], [], [], []
    for tree in forest.trees:
        trunk = len(segments)
        for number, (start, end) in enumerate(tree.spans()):
            segments.append(len(segments))
            trunks.append(trunk)
            lengths.append(end - start)
            positions.append(torch.arange(end - start) + (tree.trunk if number else 0))
    room = rounded(forest.length) - forest.length  # tokens of no tree, which see each other alone
    segments.append(len(segments))
    trunks.append(segments[-1])
    lengths.append(room)
    positions.append(torch.arange(room))
    sizes = torch.tensor(lengths)
    tables = (torch.tensor(column).repeat_interleave(sizes) for column in (segments, trunks))
    segment, trunk = (table.to(device) for table in tables)
    return segment, trunk, torch.cat(positions).to(device)
