"""One process of `test_kinds_in_processes.py`, started by torchrun: trains several kinds, writes the results."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from safetensors.torch import save_file

from support.trainer_kinds import KINDS, build, other, weights

NUMBERS = ("loss", "kl", "delta", "rewards/margins", "min_reward", "num_tokens")


def run(folder: Path, kind: str, size: int, accumulation: int) -> tuple[dict[str, torch.Tensor], int]:
    """Two epochs of 12 rows in steps of 8, the second step of an epoch not full; then 7 rows of evaluation."""
    rows = Dataset.from_list(KINDS[kind][1][:7])
    trainer = build(
        folder / kind,
        kind,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        max_steps=-1,
        eval_dataset=rows,
        **other(kind),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    numbers = [log[name] for log in logs for name in NUMBERS if name in log]
    metrics = trainer.evaluate()
    numbers += [metrics[f"eval_{name}"] for name in NUMBERS if f"eval_{name}" in metrics]
    found = {f"{kind} {name}": tensor.contiguous() for name, tensor in weights(trainer).items()}
    return {**found, f"{kind} numbers": torch.tensor(numbers, dtype=torch.float64)}, trainer.args.process_index


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, size, accumulation = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    results: dict[str, torch.Tensor] = {}
    rank = 0
    for kind in ("kto", "bco", "orpo", "sft", "reward"):
        found, rank = run(folder, kind, size, accumulation)
        results |= found
    save_file(results, folder / f"rank{rank}.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # Everything is on disk; gloo's threads sometimes abort a process that ends in the ordinary way.
        os._exit(0)
