"""LoRA+: the groups of the optimizer are those of PEFT's, and what has no effect is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer

from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def trainer(folder: Path, *, adapter: bool = True, optimizers: Any = (None, None), **options: Any) -> DPOTrainer:
    """A trainer of a tiny model, with an adapter on layers and embeddings."""
    adapted = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], bias="lora_only", use_dora=True)
    return DPOTrainer(
        model=tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2),
        args=DPOConfig(output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, **QUIET, **options),
        train_dataset=Dataset.from_list(pair_rows(8)),
        processing_class=TOKENIZER,
        peft_config=adapted if adapter else None,
        optimizers=optimizers,
    )


def rates(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, float]:
    """The learning rate of each parameter that trains."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    return {names[id(one)]: group["lr"] for group in optimizer.param_groups for one in group["params"]}


def test_learning_rates_are_those_of_peft(tmp_path: Path) -> None:
    options = {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 3e-5}
    run = trainer(tmp_path, learning_rate=1e-3, weight_decay=0.1, lr_scheduler_type="constant", **options)
    theirs = create_loraplus_optimizer(run.policy, torch.optim.AdamW, lr=1e-3, **options)
    mine = run.create_optimizer()
    found = rates(mine, run.policy)
    assert found == pytest.approx(rates(theirs, run.policy))
    assert set(found.values()) == {1e-3, 16e-3, 3e-5}
    assert {group["weight_decay"] for group in mine.param_groups} == {0.1}
    before = {name: tensor.detach().clone() for name, tensor in run.policy.named_parameters() if tensor.requires_grad}
    run.train()
    assert rates(run.optimizer, run.policy) == pytest.approx(found)
    # Adam's first step is as long as the learning rate, whatever the gradient is.
    moved = {
        name: (t.detach() - before[name]).abs().max().item()
        for name, t in run.policy.named_parameters()
        if name in before
    }
    second = [value for name, value in moved.items() if "q_proj.lora_B" in name]
    assert max(second) == pytest.approx(2 * 16e-3, rel=0.3)


def test_what_would_have_no_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loraplus_lr_ratio is 2\.0, and no LoRA adapter trains"):
        trainer(tmp_path, adapter=False, loraplus_lr_ratio=2.0)
    with pytest.raises(ConfigError, match=r"loraplus_lr_embedding is 0\.1, and loraplus_lr_ratio is not given"):
        trainer(tmp_path, loraplus_lr_embedding=0.1)
    with pytest.raises(ConfigError, match="loraplus_lr_ratio is 0"):
        trainer(tmp_path, loraplus_lr_ratio=0)
    own = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match="the optimizer is not made by the trainer"):
        trainer(tmp_path, loraplus_lr_ratio=2.0, optimizers=(own, None))
