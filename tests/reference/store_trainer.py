"""One process of `test_store_processes.py`: trains two epochs on a store and writes what it counted."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tether import DPOConfig, DPOTrainer
from tether.data import example_from_row
from tether.reference import live_reference
from tether.scoring import pack
from tiny import pair_rows, tiny_model, tiny_tokenizer


class Passes(TrainerCallback):
    """Passes of the live reference at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_epoch_end(self, args, state, control, **kwargs):
        """Read the counter."""
        self.seen.append(self.reference.forwards)


def run(folder: Path, store: str) -> None:
    """Train, then compare what is stored with what the live reference says of each row alone."""
    tokenizer, passes = tiny_tokenizer(), Passes()
    trainer = DPOTrainer(
        model=tiny_model(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2),
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            num_train_epochs=2,
            learning_rate=0.01,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=False,
            reference_store=store,
        ),
        train_dataset=Dataset.from_list(pair_rows(13)),
        processing_class=tokenizer,
        callbacks=[passes],
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    passes.reference = trainer.resolved.reference
    trainer.train()
    batches = [pack([example_from_row(row)]) for row in trainer.train_dataset]
    reference = trainer.resolved.reference
    stored = np.concatenate([value for batch in batches for value in reference.store.get(batch.keys)])
    live = np.concatenate([live_reference(reference).score(batch).numpy() for batch in batches])
    found = {
        "passes_by_epoch": np.diff([0, *passes.seen]).tolist(),
        "computed": reference.computed,
        "stored": stored.tolist(),
        "live": live.tolist(),
    }
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # Everything is on disk; gloo's threads sometimes abort a process that ends in the ordinary way.
        os._exit(0)
