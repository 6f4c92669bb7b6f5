"""One run of `reference.py` in a process of its own: train a few steps by one method, or fill or read a large store."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import peak_memory_mib, resident_memory_mib

from tether.reference import Namespace, Store
from tether.reference.store.tools import compact_store

SPACE = Namespace("b2:benchmark", "float32")
BATCH = 64
BATCHES = 2000


def key_of(number: int) -> bytes:
    """The digest of a synthetic completion."""
    return np.random.default_rng(number).bytes(16)


def value_of(number: int, tokens: int) -> np.ndarray:
    """Its log-probabilities: anyone can say whether what is read is right."""
    length = 1 + number * 7919 % (2 * tokens - 1)
    return -(np.arange(length, dtype=np.float32) + number % 1000) / 64


def fill(spec: dict[str, Any]) -> dict[str, Any]:
    """Put every completion, in batches; the time is that of the store alone."""
    ready, seconds = peak_memory_mib(), 0.0
    value_bytes = 0
    store = Store(spec["path"], SPACE)
    for start in range(0, spec["completions"], BATCH):
        numbers = range(start, min(start + BATCH, spec["completions"]))
        keys, values = [key_of(n) for n in numbers], [value_of(n, spec["tokens"]) for n in numbers]
        value_bytes += sum(value.nbytes for value in values)
        begin = time.perf_counter()
        store.put(keys, values)
        seconds += time.perf_counter() - begin
    begin = time.perf_counter()
    store.flush()
    seconds += time.perf_counter() - begin
    sizes = store.folder.sizes()
    return {
        "seconds": seconds,
        "parts": len(sizes),
        "file_bytes": sum(sizes.values()),
        "value_bytes": value_bytes,
        "ready_mib": ready,
        "peak_mib": peak_memory_mib(),
    }


def read(spec: dict[str, Any]) -> dict[str, Any]:
    """Open, then look up random batches and compare what comes with what is right."""
    ready = peak_memory_mib()
    begin = time.perf_counter()
    store = Store(spec["path"], SPACE)
    open_seconds = time.perf_counter() - begin
    opened = peak_memory_mib()
    draw, seconds = np.random.default_rng(0), []
    for _ in range(BATCHES):
        numbers = draw.integers(0, spec["completions"], BATCH).tolist()
        keys = [key_of(n) for n in numbers]
        begin = time.perf_counter()
        found = store.get(keys)
        seconds.append(time.perf_counter() - begin)
        for number, value in zip(numbers, found, strict=True):
            if value is None or not np.array_equal(value, value_of(number, spec["tokens"])):
                raise SystemExit(f"completion {number} came back wrong")
    return {
        "open_seconds": open_seconds,
        "completions": len(store),
        "index_bytes": store.index_bytes,
        "batch_seconds": float(np.median(seconds)),
        "batches": BATCHES,
        "ready_mib": ready,
        "open_mib": opened,
    }


def compact(spec: dict[str, Any]) -> dict[str, Any]:
    """Merge the parts."""
    begin = time.perf_counter()
    before, after = compact_store(spec["path"])
    return {"seconds": time.perf_counter() - begin, "before": before, "after": after}


def make_trainer(spec: dict[str, Any], callbacks: list[Any]) -> Any:
    """The run of a specification, ready to train."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler

    from tether import DPOConfig, DPOTrainer

    torch.set_num_threads(spec["threads"])
    method = spec["method"]
    stored = method.startswith("store")
    trainer = DPOTrainer(
        model=spec["model"],
        args=DPOConfig(
            output_dir=str(Path(spec["folder"], "run")),
            model_init_kwargs={"dtype": "float32"},
            bf16=False,
            cpu_matmul=spec["cpu_matmul"],
            gradient_checkpointing=spec["gradient_checkpointing"],
            max_tokens_per_forward=None,  # a step is one forward, so that passes of the reference can be counted
            use_cpu=True,
            per_device_train_batch_size=spec["pairs"],
            max_steps=spec["steps"] + 1,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            reference="start",
            reference_method=None if stored else method,
            reference_store=spec["store"] if stored else None,
            reference_check_steps=0,
        ),
        train_dataset=Dataset.from_list(spec["rows"]),
        callbacks=callbacks,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        if spec["kind"] == "lora"
        else None,
    )
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    return trainer


def precompute(spec: dict[str, Any]) -> dict[str, Any]:
    """Fill the store of a run; not timed."""
    filled = make_trainer(spec, []).precompute_reference()
    return {"present": filled.present, "computed": filled.computed}


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Some steps by one method, with the passes of the live reference counted, and the store's part of a step timed."""
    from vs_trl_worker import Clock

    from tether.reference import StoredReference

    clock = Clock()
    trainer = make_trainer(spec, [clock])
    calls: list[float] = []
    lookups: list[float] = []
    reference: Any = trainer.run.reference
    live: Any = reference.live

    def timed(score: Any, seconds: list[float]) -> Any:
        def run(*arguments: Any) -> Any:
            begin = time.perf_counter()
            values = score(*arguments)
            seconds.append(time.perf_counter() - begin if clock.wall else 0.0)
            return values

        return run

    live.score = timed(live.score, calls)
    if isinstance(reference, StoredReference):
        # All that a stored reference does in a step, less what the live one did in it.
        reference.score = timed(reference.score, lookups)  # type: ignore[method-assign]
    begin = time.perf_counter()
    trainer.train()
    steps = [after - before for before, after in itertools.pairwise(clock.wall)]
    guards = 2  # start equality and the frozen probe's first values
    return {
        "method": spec["method"],
        "step_seconds": steps,
        "all_step_seconds": [clock.wall[0] - begin, *steps],
        "peak_mib": peak_memory_mib(),
        "resident_mib": resident_memory_mib(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "reference_passes": len(calls) - guards,
        "lookup_seconds": sum(lookups) - sum(calls) if lookups else 0.0,
    }


JOBS = {"fill": fill, "read": read, "compact": compact, "precompute": precompute, "train": train}

if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer = JOBS[asked["job"]](asked)
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
