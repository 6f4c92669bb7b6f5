"""Seconds and memory by the number of pairs: reading a file, preparing it, checking it, and training a few steps.

    .venv/bin/python benchmarks/scale.py [--pairs 1000 10000 100000] [--what read prepare check train start]
        [--without-language] [--out FILE.json]

Each figure is of a process of its own. `train` is the first run on a file, which prepares it and keeps the result;
`start` the second, which finds it prepared. Both say what went before their first step and what a step takes, the
median of eight. Processor time is given beside seconds, since it is the same on a busy machine. `--without-language`
measures what an installation without tether[language] does. `--pairs 1000000` is an option: its file has 2 GB. Memory
is the most that the process had resident; `own` is the part of it that no file lies behind, which the system cannot
take back, less what it was before the process saw a row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    PrivateMemory,
    is_worker,
    markdown,
    new_report,
    peak_memory_mib,
    read_spec,
    run_worker,
    write_report,
    write_result,
)

WHAT = ("read", "prepare", "check", "train", "start")
HEADER = ("what", "pairs", "file, MB", "seconds", "CPU, s", "µs a pair", "before a step, CPU", "a step, CPU")
HEADER += ("resident, MiB", "own, MiB")
STEPS = 8
_WORDS = 4000


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--without-language", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args()
    report, rows = new_report({"pairs": options.pairs, "languages": not options.without_language}), []
    with tempfile.TemporaryDirectory(prefix="tether-scale-") as folder:
        for pairs in options.pairs:
            file = write_pairs(Path(folder) / f"{pairs}.jsonl", pairs)
            size = file.stat().st_size / 1e6
            for what in options.what:
                spec = {"what": what, "file": str(file), "languages": not options.without_language}
                found = run_worker(Path(__file__), {**spec, "cache": str(Path(folder) / "cache")})
                report["results"].append({"what": what, "pairs": pairs, "file_mb": size, **found})
                figures = [f"{size:.1f}", f"{found['seconds']:.2f}", f"{found['cpu']:.2f}"]
                figures.append(f"{found['cpu'] / pairs * 1e6:.0f}")
                figures += [f"{found[name]:.2f}" if name in found else "" for name in ("before_step", "step")]
                figures += [f"{found['peak_mib']:.0f}", f"{found['own_mib']:.0f}"]
                rows.append((what, f"{pairs:,}", *figures))
                print(" ".join(map(str, rows[-1])), flush=True)
                options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # a run may be ended
            file.unlink()
            shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
    print("\n" + markdown(HEADER, rows))
    write_report(report, options.out)


def write_pairs(path: Path, count: int) -> Path:
    """Pairs of about 300 words, all different, as conversations have them."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(_WORDS)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt, chosen, rejected = (
                " ".join(draw.choices(words, k=draw.randint(2, mean * 2))) for mean in (150, 75, 75)
            )
            row = {"prompt": f"{number}: {prompt}", "chosen": f" {chosen}", "rejected": f" {rejected}"}
            file.write(json.dumps(row) + "\n")
    return path


def work() -> None:
    """The worker: do one thing to one file."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from transformers import TrainerCallback

    from tether import DPOConfig, DPOTrainer
    from tether.data import prepare
    from tether.data.audit.audit import check
    from tether.data.sources.load import load_rows
    from tiny import tiny_model, tiny_tokenizer

    spec = read_spec()
    tokenizer = tiny_tokenizer()
    if not spec["languages"]:
        sys.modules["lingua"] = None  # type: ignore[assignment]  # as if it were not installed
    steps: list[float] = []

    class Steps(TrainerCallback):
        """When each step began, and when the last one ended."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.append(time.process_time())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            steps.append(time.process_time())

    def train() -> Any:
        shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
        args = DPOConfig(
            output_dir=spec["folder"],
            max_steps=STEPS,
            per_device_train_batch_size=4,
            max_length=512,
            report_to="none",
            use_cpu=True,
            dataset_cache=spec["cache"],
            save_strategy="no",
        )
        model = tiny_model(**shape)
        data = {"train_dataset": spec["file"], "processing_class": tokenizer}
        return DPOTrainer(model=model, args=args, callbacks=[Steps()], **data).train()

    does = {
        "read": lambda: load_rows(spec["file"]),
        "prepare": lambda: prepare(load_rows(spec["file"]), tokenizer, max_length=512),
        "check": lambda: check(load_rows(spec["file"]), tokenizer=tokenizer),
        "train": train,
        "start": train,
    }
    start, computed = time.perf_counter(), time.process_time()
    with PrivateMemory() as own:
        does[spec["what"]]()
    found = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - computed}
    found |= {"own_mib": own.peak_mib - own.before_mib, "peak_mib": peak_memory_mib()}
    if steps:
        between = [later - earlier for earlier, later in itertools.pairwise(steps)]
        found |= {"before_step": steps[0] - computed, "step": statistics.median(between)}
    write_result(found)


if __name__ == "__main__":
    work() if is_worker() else main()
