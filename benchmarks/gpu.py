"""Tether against TRL, with and without Liger, on one accelerator: shapes of 0.5B to 8B parameters, random weights.

    python benchmarks/gpu.py [--shapes 0.5b 1.5b 8b] [--methods lora full] [--profiles hh] [--out FILE.json]

Needs no network, no model and no tokenizer file: weights are random and words are tokens. A machine without a package
index needs wheels of tether, trl, peft and liger-kernel brought along; what is missing is left out and said. `--device
cpu --shapes tiny` runs the same on a processor, as a check of this program.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import WorkerError, machine, run_worker, table, versions
from lengths import PROFILES, make_rows, tokens_per_step
from vs_trl import FIRST_LOSS_TOLERANCE, LORA_R, MAX_LENGTH, SEED, WORKER
from vs_trl_worker import word_tokenizer

# Hidden size, intermediate size, layers, heads, key-value heads, vocabulary: those of Qwen 2.5 and Llama 3.
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 8_000),
    "0.5b": (896, 4864, 24, 14, 2, 151_936),
    "1.5b": (1536, 8960, 28, 12, 2, 151_936),
    "3b": (2048, 11008, 36, 16, 2, 151_936),
    "8b": (4096, 14336, 32, 32, 8, 128_256),
}
TOOLS = ("tether", "trl", "trl+liger")


def main() -> int:
    """Measure; 0 if every run began at ln 2 on the tokens that it was given."""
    options = parse(sys.argv[1:])
    tools = [tool for tool in TOOLS if available(tool)]
    missing = sorted(set(TOOLS) - set(tools))
    if missing:
        print(f"not installed, so left out: {', '.join(missing)}", flush=True)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**machine(), "device": device_name(options.device)},
        "versions": versions(),
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "results": [],
    }
    for shape in options.shapes:
        for method in options.methods:
            for profile in options.profiles:
                report["results"].append(measure(shape, method, profile, tools, options))
                if options.out:
                    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(show(report["results"], tools))
    problems = [
        f"{row['shape']} {row['method']}: {problem}" for row in report["results"] for problem in row["problems"]
    ]
    print("\n".join(problems))
    return 1 if problems else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "1.5b", "8b"])
    parser.add_argument("--methods", nargs="+", choices=("lora", "full"), default=["lora"])
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=["hh", "ultrafeedback"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--checkpointing", choices=("on", "off"), default="on")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run (6)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (3)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each tool, in turns (2)")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write all raw numbers to this JSON file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; `--device cpu --shapes tiny` checks this program without one")
    return options


def available(tool: str) -> bool:
    """Whether everything that a tool needs is installed."""
    needs = {"tether": ["tether"], "trl": ["trl"], "trl+liger": ["trl", "liger_kernel"]}
    return all(find_spec(package) for package in needs[tool])


def device_name(device: str) -> str:
    """What the runs run on."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def configuration(shape: str) -> dict[str, Any]:
    """Keywords of `AutoConfig.for_model`: a Llama of this shape."""
    hidden, intermediate, layers, heads, key_value_heads, vocabulary = SHAPES[shape]
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2 * MAX_LENGTH,
        "tie_word_embeddings": hidden < 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def measure(shape: str, method: str, name: str, tools: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All runs of one shape, in turns; a tool that runs out of memory says so and is not run again."""
    tokenizer, profile = word_tokenizer(), PROFILES[name]
    rows = make_rows(tokenizer, profile, options.warmup + options.steps, seed=SEED)
    expected = list(tokens_per_step(tokenizer, rows, profile.pairs))
    spec = {
        "model": configuration(shape),
        "method": method,
        "rows": rows,
        "pairs": profile.pairs,
        "gradient_checkpointing": options.checkpointing == "on",
        "learning_rate": 1e-6,
        "lora_r": LORA_R,
        "max_length": MAX_LENGTH,
        "seed": SEED,
        **{key: getattr(options, key) for key in ("steps", "warmup", "threads", "precision", "device")},
    }
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
    failed: dict[str, str] = {}
    for _ in range(options.repeats):
        for tool in tools:
            if tool in failed:
                continue
            try:
                runs[tool].append(run_worker(WORKER, {**spec, "tool": tool}))
            except WorkerError as error:
                failed[tool] = str(error).splitlines()[-1]
                print(f"{shape} {method} {name}, {tool}: {failed[tool]}", flush=True)
    medians = {
        tool: {key: median(_middle(run[key]) for run in own) for key in ("step_seconds", "peak_mib")}
        for tool, own in runs.items()
        if own
    }
    problems = [
        f"{tool} did other work than it was given"
        for tool, own in runs.items()
        for run in own
        if [round(tokens) for tokens in run["num_tokens"]] != expected
        or not abs(run["losses"][0] - math.log(2)) <= FIRST_LOSS_TOLERANCE
    ]
    return {
        "shape": shape,
        "method": method,
        "profile": name,
        "tokens_per_step": expected,
        "medians": medians,
        "failed": failed,
        "problems": problems,
        "runs": runs,
    }


def _middle(value: float | list[float]) -> float:
    return median(value) if isinstance(value, list) else value


def show(results: list[dict[str, Any]], tools: list[str]) -> str:
    """Seconds a step and peak memory of each tool, and Tether's step rate over each other's."""
    others = [tool for tool in tools if tool != "tether"]
    header = ["run", *(f"{tool} s/step" for tool in tools), *(f"speed over {tool}" for tool in others)]
    lines = []
    for row in results:
        medians = row["medians"]
        cells = [
            f"{medians[t]['step_seconds']:.3f} ({medians[t]['peak_mib']:.0f} MiB)" if t in medians else "failed"
            for t in tools
        ]
        for other in others:
            both = "tether" in medians and other in medians
            cells.append(f"{medians[other]['step_seconds'] / medians['tether']['step_seconds']:.2f}x" if both else "-")
        lines.append([f"{row['shape']} {row['method']} {row['profile']}", *cells])
    return table(header, lines)


if __name__ == "__main__":
    sys.exit(main())
