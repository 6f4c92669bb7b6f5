"""One process of `test_store_processes.py`: trains two epochs on a store, once for each folder that is named."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, TrainerCallback

from sharding import finish, is_held, settings
from tether import DPOConfig, DPOTrainer
from tether.data import example_from_row
from tether.reference import StoredReference
from tether.scoring import pack
from tiny import pair_rows, tiny_model, tiny_tokenizer


class Passes(TrainerCallback):
    """Passes of the live reference at the end of each epoch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_epoch_end(self, args, state, control, **kwargs):
        """Read the counter."""
        self.seen.append(self.reference.forwards)


def run(folder: Path, store: str, how: str, model: PreTrainedModel) -> None:
    """Train and evaluate, then compare what is stored with what the live reference says of each row alone."""
    folder.mkdir(exist_ok=True)
    tokenizer, passes = tiny_tokenizer(), Passes()
    trainer = DPOTrainer(
        model=deepcopy(model),
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=1,
            num_train_epochs=2,
            learning_rate=0.01,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=False,
            reference_store=store,
            **settings(how),
        ),
        train_dataset=Dataset.from_list(pair_rows(18)[:13]),
        eval_dataset=Dataset.from_list(pair_rows(18)[13:]),
        processing_class=tokenizer,
        callbacks=[passes],
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    passes.reference = reference_of(trainer)
    trainer.train()
    assert is_held(trainer, how), f"the policy is not held as {how} holds it"
    # 5 rows that no epoch has seen; 2 processes cannot share them evenly.
    losses = []
    for _ in range(2):
        losses.append(trainer.evaluate()["eval_loss"])
        passes.seen.append(reference_of(trainer).forwards)
    batches = [pack([example_from_row(row)]) for row in trainer.train_dataset]
    reference = reference_of(trainer)
    stored = np.concatenate([value for batch in batches for value in reference.store.get(batch.keys)])
    live = np.concatenate([reference.live.score(batch).token_logps.numpy() for batch in batches])
    found = {
        "passes": np.diff([0, *passes.seen]).tolist(),
        "computed": reference.computed,
        "losses": losses,
        "stored": stored.tolist(),
        "live": live.tolist(),
    }
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(found))


def reference_of(trainer: DPOTrainer) -> StoredReference:
    """The reference with its store."""
    reference = trainer.run.reference
    assert isinstance(reference, StoredReference)
    return reference


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Made once: under ZeRO-3, transformers begins a later one with other random numbers.
    start = tiny_model(vocab_size=len(tiny_tokenizer()), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for name in sys.argv[3:-1]:
        run(Path(sys.argv[1]) / name, sys.argv[2], sys.argv[-1], start)
    finish()
