"""One process of `test_sharded.py`, started by torchrun: trains with or without FSDP2 and writes what it found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from tether import DPOConfig, DPOTrainer
from tether.reference import live_reference
from tether.reference.shards import drop_gathered
from tiny import pair_rows, tiny_model, tiny_tokenizer


def let_accelerate_shard_on_cpu() -> None:
    """Accelerate ignores FSDP2 where processes are on CPUs; here the type is set as it is for accelerators."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            # Every later state takes the type from the partial one.
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def run(folder: Path, kind: str, sharded: bool) -> None:
    """Four steps of 4 pairs on 12 rows; the reference's probe before, in the middle of and after them."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    wrap = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    settings = {"fsdp": True, "fsdp_config": wrap} if sharded else {}
    if kind == "released":
        settings["reference_store"] = str(folder / "store")
    if kind in ("moving", "moving model"):
        settings |= {"sync_ref_model": True, "ref_model_sync_steps": 2, "save_strategy": "steps", "save_steps": 2}
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=kind != "snapshot")
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    trainer = DPOTrainer(
        model=tiny_model(**tokens),
        ref_model=tiny_model(seed=5, **tokens) if kind == "moving model" else None,
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=1 if sharded else 4,
            gradient_accumulation_steps=2 if sharded else 1,
            max_steps=4,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=False,
            reference_check_steps=1,
            seed=3,
            **{"save_strategy": "no", **settings},
        ),
        train_dataset=Dataset.from_list(pair_rows(12)),
        processing_class=tokenizer,
        peft_config=lora if kind in ("lora", "snapshot") else None,
    )
    reference = live_reference(trainer.resolved.reference)
    found = {"before": reference.score(trainer._probe)}
    trainer.train()
    assert getattr(reference, "resident", True) == (kind != "released"), "the store is full, the snapshot is not needed"
    drop_gathered(trainer.policy)  # the last forward's head
    if sharded:
        assert all(isinstance(parameter, DTensor) for parameter in trainer.policy.parameters()), "nothing is sharded"
    policy = {name: value.detach() for name, value in trainer.policy.named_parameters() if value.requires_grad}
    whole = {name: value.full_tensor() if sharded else value for name, value in policy.items()}
    found["after"] = reference.score(trainer._probe)
    drop_gathered(trainer.policy)
    again = {name: value.detach() for name, value in trainer.policy.named_parameters() if value.requires_grad}
    for name, value in again.items():
        mine = value.full_tensor() if sharded else value
        assert torch.equal(mine, whole[name]), f"a reference pass changed {name}"
    found |= {name: value.contiguous() for name, value in whole.items()}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    found["losses"] = torch.tensor(losses, dtype=torch.float64)
    (folder / f"means{trainer.args.process_index}.txt").write_text(reference.identity.means)
    save_file(found, folder / f"rank{trainer.args.process_index}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    let_accelerate_shard_on_cpu()
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "sharded")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # Everything is on disk; gloo's threads sometimes abort a process that ends in the ordinary way.
        os._exit(0)
