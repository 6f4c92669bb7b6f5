"""In which precision a run computes: on a CPU, bfloat16 where it is measured to pay."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from tether.errors import ConfigError
from tether.models.structure import dtype_of, transformers_model
from tether.training.arguments import PreferenceConfig

logger = logging.getLogger("tether")
PRECISION = "precision.json"
# Matrix products must be this much faster, casts of the weights included, for a step to be worth its rounding.
_WORTH = 1.3
# In smaller layers the time goes into everything but matrix products.
_LEAST_WEIGHT = 2**17
_ROWS = 1024
_REPEATS = 5
_FLAGS = ("avx512_bf16", "amx_bf16")


def choose_precision(args: PreferenceConfig, model: nn.Module) -> None:
    """Decide what `bf16` left open, for all processes alike, and say it in one line.

    Mixed precision, not bfloat16 weights: trainable tensors, their optimizer, softmax and log-probs stay in float32.

    Args:
        args: `bf16` unset means: on, where a matrix product of the model's own shapes is measured to be 1.3 times as
            fast on the threads of this run, and the processor has instructions for it.
        model: the policy.
    """
    # A launcher may have set it in the environment.
    if args.bf16 is not None or args.mixed_precision != "no":
        logger.info(f"precision: {_name(args, model)}")
        return
    decision: list[tuple[bool, str]] = [_decide(model) if args.process_index == 0 else (False, "")]
    if args.world_size > 1:
        broadcast_object_list(decision)
    args.bf16, reason = decision[0]  # type: ignore[assignment]
    if args.bf16:
        args.mixed_precision = "bf16"
    logger.info(f"precision: {_name(args, model)} ({reason}; set bf16 to choose)")


def _name(args: PreferenceConfig, model: nn.Module) -> str:
    mixed = {"bf16": "bfloat16 autocast", "fp16": "float16 autocast"}
    return mixed.get(args.mixed_precision) or str(dtype_of(model)).removeprefix("torch.")


def _decide(model: nn.Module) -> tuple[bool, str]:
    if dtype_of(model) != torch.float32:
        return False, "the dtype of the weights"
    found = [flag for flag in _FLAGS if flag in processor_flags()]
    if not found:
        return False, f"this processor has neither {' nor '.join(_FLAGS)}"
    weight = widest_weight(model)
    if weight is None or weight.numel() < _LEAST_WEIGHT:
        return False, f"layers of fewer than {_LEAST_WEIGHT} weights gain nothing from bfloat16"
    gain = bfloat16_gain(weight)
    return gain >= _WORTH, f"measured {gain:.1f}x float32's matmul rate on this processor, with {found[0]}"


def processor_flags() -> frozenset[str]:
    """What the processor says that it can do, as Linux lists it; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def widest_weight(model: nn.Module) -> Tensor | None:
    """The largest matrix inside the layers: neither the embeddings nor the head."""
    inner = transformers_model(model)
    ends = [one.weight for one in (inner.get_input_embeddings(), inner.get_output_embeddings()) if one is not None]
    inside = [p for p in inner.parameters() if p.dim() == 2 and not any(p is end for end in ends)]
    return max(inside, key=Tensor.numel, default=None)  # type: ignore[arg-type]


def bfloat16_gain(weight: Tensor) -> float:
    """How many times as fast a product with this matrix is in bfloat16, the cast of the matrix included.

    Both are measured in turns and the fastest of each counts, since other work on the machine can only slow one down.
    """
    matrix = weight.detach()
    inputs = torch.ones(_ROWS, matrix.shape[1])
    narrow = inputs.bfloat16()
    best = {"float32": float("inf"), "bfloat16": float("inf")}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for repeat in range(_REPEATS + 1):
            for name in best:
                start = time.perf_counter()
                if name == "float32":
                    nn.functional.linear(inputs, matrix)
                else:
                    nn.functional.linear(narrow, matrix.bfloat16())
                if repeat:  # the first of each finds its memory and its kernel
                    best[name] = min(best[name], time.perf_counter() - start)
    return best["float32"] / best["bfloat16"]


def write_precision(folder: Path, args: PreferenceConfig) -> None:
    """Keep in a checkpoint what its run computed in."""
    (folder / PRECISION).write_text(json.dumps({"mixed_precision": args.mixed_precision}) + "\n", encoding="utf-8")


def require_same_precision(folder: Path, args: PreferenceConfig) -> None:
    """A resumed run computes as before, on another machine too.

    Raises:
        ConfigError: the checkpoint's run computed in another precision.
    """
    path = folder / PRECISION
    before = json.loads(path.read_text(encoding="utf-8"))["mixed_precision"] if path.is_file() else args.mixed_precision
    if before != args.mixed_precision:
        raise ConfigError(
            f"The checkpoint {folder} was trained with mixed precision {before!r}, and this run has "
            f"{args.mixed_precision!r}. Set bf16={before == 'bf16'} and fp16={before == 'fp16'} to go on as it began."
        )
