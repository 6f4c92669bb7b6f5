"""One process of `test_sharded.py` and `test_deepspeed.py`: trains whole or in shards and writes what it found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sharding import finish, is_held, settings
from tether import DPOConfig, DPOTrainer
from tether.models.structure import trainable_tensors
from tether.reference.methods.shards import gather_shards, is_sharded, local_part, release_gathered
from tiny import pair_rows, tiny_model, tiny_tokenizer


def make_trainer(folder: Path, kind: str, how: str, model: PreTrainedModel, steps: int = 4) -> DPOTrainer:
    """A run of steps of 4 pairs on 12 rows, with 5 rows of evaluation that 2 processes cannot share evenly."""
    tokenizer = tiny_tokenizer()
    batch, accumulated = {"whole": (4, 1), "accumulated": (1, 4)}.get(how, (1, 2))
    special = {
        "moving": {"sync_ref_model": True, "ref_model_sync_steps": 2},
        # More forwards than batches, and not equally many on each process.
        "budget": {"max_tokens_per_forward": 60},
        "moving model": {"sync_ref_model": True, "ref_model_sync_steps": 2},
        "released": {"reference_store": str(folder / "store")},
    }
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=kind != "snapshot")
    trainer = DPOTrainer(
        model=model,
        ref_model=str(folder / f"start{os.environ.get('RANK', 0)}" / "other") if "model" in kind else None,
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            per_device_eval_batch_size=5 if how == "whole" else 1,
            max_steps=steps,
            learning_rate=0.4 / steps,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=False,
            reference_check_steps=1,
            save_strategy="steps" if steps == 4 else "no",
            save_steps=2,
            seed=3,
            **special.get(kind, {}),
            **settings(how),
        ),
        train_dataset=Dataset.from_list(pair_rows(12)),
        eval_dataset=Dataset.from_list(pair_rows(5)),
        processing_class=tokenizer,
        peft_config=lora if kind in ("lora", "snapshot") else None,
    )
    # With a state, since torch cannot load one without tensors into shards.
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": trainer.args.learning_rate, "momentum": 0.5})
    return trainer


def start(seed: int, kind: str) -> PreTrainedModel:
    """A model in memory, whole."""
    shape = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return tiny_model(**shape, seed=seed, tie_word_embeddings=kind == "tied")


def weights(trainer: DPOTrainer) -> dict[str, Tensor]:
    """Whole values of all trainable tensors, gathered where they are in shards."""
    release_gathered(trainer.policy)
    tensors = trainable_tensors(trainer.policy)
    return {name: gather_shards(local_part(value).clone(), value).contiguous() for name, value in tensors.items()}


def run(folder: Path, kind: str, how: str) -> None:
    """The reference's probe before and after training, losses, weights, evaluation; then the same resumed.

    The second model is loaded when there is a configuration already, so that transformers cuts it at once under ZeRO-3.
    """
    model, mine = start(0, kind), folder / f"start{os.environ.get('RANK', 0)}"
    model.save_pretrained(mine)
    start(1, kind).save_pretrained(mine / "other")
    trainer = make_trainer(folder, kind, how, model)
    reference = trainer.run.reference.live
    found = {"before": reference.score(trainer.run.probe).token_logps}
    trainer.train()
    assert is_held(trainer, how), f"the policy is not held as {how} holds it"
    if kind == "model" and how in ("fsdp", "zero3"):
        assert is_sharded(reference._model), "the reference model is whole"
    assert getattr(reference, "resident", True) == (kind != "released"), "the store is full, the snapshot is not needed"
    held = weights(trainer)
    found["after"] = reference.score(trainer.run.probe).token_logps
    for name, value in weights(trainer).items():
        assert torch.equal(value, held[name]), f"a reference pass changed {name}"
    found |= held
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    found["losses"] = torch.tensor(losses, dtype=torch.float64)
    metrics = trainer.evaluate()
    names = ("loss", "rewards/margins", "entropy", "logps/chosen")
    found["evaluation"] = torch.tensor([metrics[f"eval_{name}"] for name in names], dtype=torch.float64)
    trainer.save_model(str(folder / "saved"))
    (folder / f"method{trainer.args.process_index}.txt").write_text(reference.identity.method)
    again = make_trainer(folder, kind, how, AutoModelForCausalLM.from_pretrained(mine))
    found["start"] = torch.tensor(again.evaluate()["eval_loss"], dtype=torch.float64)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    for name, value in weights(again).items():
        torch.testing.assert_close(value, held[name], atol=1e-6, rtol=1e-5, msg=f"resumed: {name}")
    save_file(found, folder / f"rank{trainer.args.process_index}.safetensors")


def trajectory(folder: Path, kind: str, how: str) -> None:
    """Twenty steps: what is logged of each, from which the reference's log-probs follow, and those of its probe."""
    trainer = make_trainer(folder, kind, how, start(0, kind), 20)
    trainer.train()
    assert is_held(trainer, how), f"the policy is not held as {how} holds it"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    names = (
        "loss",
        "grad_norm",
        *(f"{what}/{side}" for what in ("logps", "rewards") for side in ("chosen", "rejected")),
    )
    found = {name: torch.tensor([log[name] for log in logs], dtype=torch.float64) for name in names}
    found["probe"] = trainer.run.reference.live.score(trainer.run.probe).token_logps
    save_file(found, folder / f"rank{trainer.args.process_index}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    does = {"run": run, "trajectory": trajectory}[sys.argv[4]] if len(sys.argv) > 4 else run
    does(Path(sys.argv[1]), *sys.argv[2:4])
    finish()
