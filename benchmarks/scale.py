"""Seconds and memory by the number of pairs: reading a file, preparing it, checking it, and one step of training.

    .venv/bin/python benchmarks/scale.py [--pairs 1000 10000 100000] [--what read prepare check train] [--out FILE.json]

Each figure is of a process of its own, without the cache of prepared rows. `--pairs 1000000` is an option: its file has
2 GB. Memory is the most that the process had resident; `own` is the part of it that no file lies behind, which the
system cannot take back, less what it was before the process saw a row.
"""

from __future__ import annotations

import argparse
import json
import random
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

WHAT = ("read", "prepare", "check", "train")
HEADER = ("what", "pairs", "file, MB", "seconds", "µs a pair", "resident, MiB", "own, MiB")
_WORDS = 4000


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args()
    report, rows = new_report({"pairs": options.pairs}), []
    with tempfile.TemporaryDirectory(prefix="tether-scale-") as folder:
        for pairs in options.pairs:
            file = write_pairs(Path(folder) / f"{pairs}.jsonl", pairs)
            size = file.stat().st_size / 1e6
            for what in options.what:
                found = run_worker(Path(__file__), {"what": what, "file": str(file), "pairs": pairs})
                report["results"].append({"what": what, "pairs": pairs, "file_mb": size, **found})
                figures = [f"{size:.1f}", f"{found['seconds']:.2f}", f"{found['seconds'] / pairs * 1e6:.0f}"]
                figures += [f"{found['peak_mib']:.0f}", f"{found['own_mib']:.0f}"]
                rows.append((what, f"{pairs:,}", *figures))
                print(" ".join(map(str, rows[-1])), flush=True)
                options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # a run may be ended
            file.unlink()
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
    from tether import DPOConfig, DPOTrainer
    from tether.data import prepare
    from tether.data.audit.audit import check
    from tether.data.sources.load import load_rows
    from tiny import tiny_model, tiny_tokenizer

    spec = read_spec()
    tokenizer = tiny_tokenizer()

    def train() -> Any:
        shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
        args = DPOConfig(
            output_dir=spec["folder"],
            max_steps=1,
            per_device_train_batch_size=4,
            max_length=512,
            report_to="none",
            use_cpu=True,
            dataset_cache=None,
            save_strategy="no",
        )
        model = tiny_model(**shape)
        return DPOTrainer(model=model, args=args, train_dataset=spec["file"], processing_class=tokenizer).train()

    does = {
        "read": lambda: load_rows(spec["file"]),
        "prepare": lambda: prepare(load_rows(spec["file"]), tokenizer, max_length=512),
        "check": lambda: check(load_rows(spec["file"]), tokenizer=tokenizer),
        "train": train,
    }
    start = time.perf_counter()
    with PrivateMemory() as own:
        does[spec["what"]]()
    seconds = time.perf_counter() - start
    write_result({"seconds": seconds, "own_mib": own.peak_mib - own.before_mib, "peak_mib": peak_memory_mib()})


if __name__ == "__main__":
    work() if is_worker() else main()
