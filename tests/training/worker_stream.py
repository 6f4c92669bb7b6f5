"""One process of `test_streaming.py`, started by torchrun: trains on rows in memory or on the same rows as a stream."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

import streams
from tether import DPOConfig, DPOTrainer
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer


def run(folder: Path, stream: bool) -> None:
    tokenizer, rows = tiny_tokenizer(), pair_rows(45)
    rows[12] = {**rows[12], "rejected": rows[12]["chosen"]}
    trainer = DPOTrainer(
        model=tiny_model(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2),
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            max_steps=6,
            train_sampling_strategy="sequential",
            stream_dataset=stream,
            learning_rate=0.01,
            optim="sgd",
            **QUIET,
            gradient_checkpointing=False,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    batches, inner = [], trainer.run.algorithm.begin_step

    def begin_step(step, passes):
        batches.append([[one.source_row for one in part.batch.examples] for part in step.parts if part.counts])
        return inner(step, passes)

    trainer.run.algorithm.begin_step = begin_step
    trainer.train()
    found = {name: p.detach().contiguous() for name, p in trainer.policy.named_parameters() if p.requires_grad}
    save_file(found, folder / f"rank{trainer.args.process_index}.safetensors")
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps({"batches": batches, "losses": losses}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        streams.small_chunks(patch)
        run(Path(sys.argv[1]), sys.argv[2] == "stream")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # As in worker.py: gloo's threads sometimes abort a process that ends in the ordinary way.
        os._exit(0)
