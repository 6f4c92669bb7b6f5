"""One process of `test_processes.py`, started by torchrun: trains, evaluates, writes what it found."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file

from tether import DPOConfig, DPOTrainer
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

# What DDP is told beside its defaults; it changes nothing that is computed.
DDP = {
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 1,
    "ddp_broadcast_buffers": True,
    "ddp_backend": "gloo",
    "ddp_timeout": 600,
}


def run(folder: Path, size: int, accumulation: int, tokens: int | None) -> None:
    """Two epochs of 13 rows in steps of 8 pairs, the second step of an epoch not full; then 7 rows of evaluation.

    `tokens` is the budget of a forward; also written is how many forwards each batch needed and how many it took.
    """
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    # As of GPT-2's causal mask of old, for which TRL has `ignore_bias_buffers`: DDP sends buffers before each forward.
    model.model.register_buffer("flags", torch.ones(3, dtype=torch.bool), persistent=False)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(folder),
            # One part of the loss is averaged over pairs, the other over tokens.
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 0.5],
            per_device_train_batch_size=size,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            **QUIET,
            gradient_checkpointing=False,
            max_grad_norm=0.0,
            max_tokens_per_forward=tokens,
            **(DDP if "WORLD_SIZE" in os.environ else {}),
        ),
        train_dataset=Dataset.from_list(pair_rows(13)),
        eval_dataset=Dataset.from_list(pair_rows(7)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    probe = trainer.run.reference.score(trainer.run.probe).token_logps
    counts = []
    split = trainer.run.budget.split

    def counting(batch, *arguments):
        parts = split(batch, *arguments)
        counts.append([len(split(batch)), len(parts)])
        return parts

    trainer.run.budget.split = counting
    trainer.train()
    trainer.run.budget.split = split
    if "WORLD_SIZE" in os.environ:
        told = {name: getattr(trainer.model_wrapped, name) for name in ("find_unused_parameters", "broadcast_buffers")}
        told |= {"bucket": trainer.model_wrapped.bucket_bytes_cap, "backend": torch.distributed.get_backend()}
        (folder / f"ddp{trainer.args.process_index}.json").write_text(json.dumps(told))
    numbers = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    numbers += [log["rewards/margins"] for log in trainer.state.log_history if "loss" in log]
    metrics = trainer.evaluate()
    numbers += [metrics[f"eval_{name}"] for name in ("loss", "rewards/margins", "entropy", "logps/chosen")]
    found = {name: p.detach().contiguous() for name, p in trainer.policy.named_parameters() if p.requires_grad}
    found |= {"numbers": torch.tensor(numbers, dtype=torch.float64), "probe": probe}
    (folder / f"counts{trainer.args.process_index}.json").write_text(json.dumps(counts))
    save_file(found, folder / f"rank{trainer.args.process_index}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) or None)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # Everything is on disk; gloo's threads sometimes abort a process that ends in the ordinary way.
        os._exit(0)
