"""In which precision and by which library a run on a CPU computes: what is measured to be fastest there."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import TrainingArguments

from tether.compute.cpu_matmul import has_onednn, onednn_product, use_products
from tether.errors import ConfigError
from tether.models.gguf import cache_root
from tether.models.structure import dtype_of, transformers_model

logger = logging.getLogger("tether")
PRECISION = "precision.json"
# Matrix products must be this much faster, casts of the weights included, to be worth another rounding; by another
# library of the same precision, as much as the measurement can tell.
_WORTH, _WORTH_A_LIBRARY = 1.3, 1.05
# In smaller layers the time goes into everything but matrix products.
_LEAST_WEIGHT = 2**17
_ROWS = 1024
_REPEATS = 5
_LIBRARY = {"default": "torch's default products", "onednn": "oneDNN's products"}
_FLAGS = ("avx512_bf16", "amx_bf16")


def choose_precision(args: TrainingArguments, model: nn.Module, *, cpu_matmul: str, on_cpu: bool) -> None:
    """Decide what `bf16` and `cpu_matmul` left open, for all processes alike, and say it in one line.

    Mixed precision, not bfloat16 weights: trainable tensors, their optimizer, softmax and log-probs stay in float32.

    Args:
        args: `bf16` unset means: on, where a product of the model's own shapes is measured to be 1.3 times as fast in
            bfloat16, and the CPU has instructions for it.
        model: the policy.
        cpu_matmul: `auto` means: oneDNN's float32 products, where such a product is measured to be 1.05 times as fast
            by it on one thread.
        on_cpu: whether the run computes on a CPU and may still decide.
    """
    # A launcher may have set it in the environment.
    is_open = args.bf16 is None and args.mixed_precision == "no"
    decision = [_decide(model, cpu_matmul, on_cpu, is_open) if args.process_index == 0 else Decision()]
    if args.world_size > 1:
        broadcast_object_list(decision)
    (decided,) = decision
    use_products(decided.library)
    if is_open:
        args.bf16 = decided.bf16  # type: ignore[assignment]
        if decided.bf16:
            args.mixed_precision = "bf16"
    # Under autocast no product that counts is in float32.
    reasons = [decided.bf16_reason if is_open else "", decided.library_reason if args.mixed_precision == "no" else ""]
    said = "; ".join(reason for reason in reasons if reason)
    logger.info(f"precision: {_name(args, model)}{f' ({said})' if said else ''}")


def _name(args: TrainingArguments, model: nn.Module) -> str:
    mixed = {"bf16": "bfloat16 autocast", "fp16": "float16 autocast"}
    return mixed.get(args.mixed_precision) or str(dtype_of(model)).removeprefix("torch.")


def require_own_precision(where: str) -> None:
    """Refuse an autocast around a trainer: what is scored inside it would be another computation than what is proved.

    Args:
        where: what was called inside it.

    Raises:
        ConfigError: it is on.
    """
    device = next((name for name in ("cpu", "cuda") if torch.is_autocast_enabled(name)), None)
    if device is not None:
        raise ConfigError(
            f"{where} was called inside torch.autocast({device!r}), which would change what policy and reference "
            "compute in one place and not in another. Call it outside, and set bf16=True or fp16=True for a run in "
            "that precision."
        )


class Decision(NamedTuple):
    """What the first process found out for all, each with a reason where there is one to give."""

    bf16: bool = False
    bf16_reason: str = ""
    library: str = "default"
    library_reason: str = ""


def _decide(model: nn.Module, cpu_matmul: str, on_cpu: bool, bf16_is_open: bool) -> Decision:
    library_is_open = cpu_matmul == "auto"
    forced = Decision() if library_is_open else Decision(False, "", cpu_matmul, f"by {_LIBRARY[cpu_matmul]}")
    if not bf16_is_open and not (library_is_open and on_cpu):
        return forced
    weight = widest_weight(model)
    if dtype_of(model) != torch.float32:
        return forced._replace(bf16_reason="the dtype of the weights")
    if weight is None or weight.numel() < _LEAST_WEIGHT:
        kind = "float32 matrices in its layers" if weight is None else f"layers of {_LEAST_WEIGHT} weights or more"
        return forced._replace(bf16_reason=f"it has no {kind} to gain from bfloat16; set bf16 to choose")
    seconds = kept_seconds(weight)
    decision = _faster_library(seconds) if library_is_open else forced
    bf16, reason = _worth_bfloat16(seconds[decision.library] / seconds["bfloat16"])
    return decision._replace(bf16=bf16, bf16_reason=reason)


def _faster_library(seconds: dict[str, float]) -> Decision:
    gain = seconds["default"] / seconds["onednn"]
    if gain < _WORTH_A_LIBRARY:
        return Decision()
    said = f"by {_LIBRARY['onednn']}, measured {gain:.2f}x {_LIBRARY['default']}; set cpu_matmul to choose"
    return Decision(library="onednn", library_reason=said)


def _worth_bfloat16(gain: float) -> tuple[bool, str]:
    found = [flag for flag in _FLAGS if flag in processor_flags()]
    if not found:
        return False, f"this processor has neither {' nor '.join(_FLAGS)}"
    return (
        gain >= _WORTH,
        f"measured {gain:.1f}x float32's matmul rate on this processor, with {found[0]}; set bf16 to choose",
    )


def processor_flags() -> frozenset[str]:
    """What the processor says that it can do, as Linux lists it; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def widest_weight(model: nn.Module) -> Tensor | None:
    """The largest float32 matrix inside the layers: neither the embeddings nor the head, and none that is quantised."""
    inner = transformers_model(model)
    ends = [one.weight for one in (inner.get_input_embeddings(), inner.get_output_embeddings()) if one is not None]
    inside = [
        p
        for p in inner.parameters()
        if type(p) is nn.Parameter and p.dtype == torch.float32 and p.dim() == 2 and not any(p is end for end in ends)
    ]
    return max(inside, key=Tensor.numel, default=None)


def kept_seconds(weight: Tensor) -> dict[str, float]:
    """`product_seconds` of this machine and shape as it was first measured, so that a busy machine decides alike.

    It is kept in the cache folder (`$TETHER_CACHE`), by what its outcome hangs on: CPU, torch, shape. The threads of a
    run are none of it: their number may depend on what else the machine does.
    """
    about = [_processor(), *sorted(processor_flags()), torch.__version__, *weight.shape]
    key = blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()
    path = cache_root() / "products" / f"{key}.json"
    try:
        return {name: float(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        pass  # not measured yet, or a file that a killed process left
    seconds = product_seconds(weight)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(seconds) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        logger.warning(
            f"precision: what was measured cannot be kept in {path.parent} ({error.strerror}), so that a later run may "
            "decide otherwise. Set bf16 and cpu_matmul to choose, or TETHER_CACHE to a folder that can be written."
        )
    return seconds


def _processor() -> str:
    """The processor's name, as Linux has it; elsewhere what Python knows."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def product_seconds(weight: Tensor) -> dict[str, float]:
    """Seconds of a product with this matrix: in float32 by each library (infinity: not there), and in bfloat16.

    The cast of the matrix is part of bfloat16's. On one thread and in its own CPU time, in turns, of which the
    fastest counts: what other processes do to the clock on the wall, or to a thread that is waited for, is not in it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds_of_each(weight)
    finally:
        torch.set_num_threads(threads)


def _seconds_of_each(weight: Tensor) -> dict[str, float]:
    matrix = weight.detach()
    inputs = torch.ones(_ROWS, matrix.shape[1])
    narrow = inputs.bfloat16()
    ways = {
        "default": lambda: nn.functional.linear(inputs, matrix),
        "onednn": lambda: onednn_product(inputs, matrix),
        "bfloat16": lambda: nn.functional.linear(narrow, matrix.bfloat16()),
    }
    best = dict.fromkeys(ways, float("inf"))
    if not has_onednn():
        del ways["onednn"]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for repeat in range(_REPEATS + 1):
            for name, way in ways.items():
                start = time.thread_time()
                way()
                if repeat:  # the first of each finds its memory and its kernel
                    best[name] = min(best[name], time.thread_time() - start)
    return best


def write_precision(folder: Path, mixed_precision: str) -> None:
    """Keep in a checkpoint what its run computed in."""
    (folder / PRECISION).write_text(json.dumps({"mixed_precision": mixed_precision}) + "\n", encoding="utf-8")


def require_same_precision(folder: Path, mixed_precision: str) -> None:
    """A resumed run computes as before, on another machine too.

    Raises:
        ConfigError: the checkpoint's run computed in another precision.
    """
    path = folder / PRECISION
    before = json.loads(path.read_text(encoding="utf-8"))["mixed_precision"] if path.is_file() else mixed_precision
    if before != mixed_precision:
        raise ConfigError(
            f"The checkpoint {folder} was trained with mixed precision {before!r}, and this run has "
            f"{mixed_precision!r}. Set bf16={before == 'bf16'} and fp16={before == 'fp16'} to go on as it began."
        )
