"""Three steps of DPO by Tether or by TRL, and their numbers."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tether import DPOTrainer
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

METRICS = (
    "loss",
    "grad_norm",
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
    *(f"{kind}/{name}" for kind in ("logps", "logits") for name in ("chosen", "rejected")),
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
)
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def run(config_class, trainer_class, folder, case):
    """Train for 3 SGD steps; returns the logged metrics, the evaluation's, and how each tensor changed."""
    case = dict(case)
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    near = case.pop("near_reference", False)
    sizes |= {"num_hidden_layers": 1} if near else {}
    family = case.pop("family", "llama")
    model = tiny_model(family, **sizes)
    reference = tiny_model(family, seed=1, **sizes) if case.pop("reference", False) else None
    if near:
        # Log-ratios of about a nat, of which exponents can be taken.
        reference, noise = tiny_model(**sizes), torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=noise)
    if reference is None and "lora" not in case and trainer_class is not DPOTrainer:
        # TRL would load its reference from the name in the config, whatever the model in memory holds.
        reference = tiny_model(family, **sizes)
    if near == "unused":
        reference = None
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if case.pop("lora", False) else None
    settings = {
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 2,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        **QUIET,
        "gradient_checkpointing": False,
        "bf16": False,
        "max_length": 24,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            model=model,
            ref_model=reference,
            args=config_class(output_dir=str(folder), **{**settings, **case}),
            train_dataset=Dataset.from_list(pair_rows()),
            eval_dataset=Dataset.from_list(pair_rows(7)),
            processing_class=tokenizer,
            peft_config=peft,
        )
        for name, parameter in trainer.model.named_parameters():
            if "lora_A" in name:
                # The two draw the adapter at different points of the random stream; B is zero, the start is the same.
                parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
        before = trained_tensors(trainer.model)
        trainer.train()
        evaluation = trainer.evaluate()
    steps = [
        {name: log[name] for name in (*METRICS, "aux_loss") if name in log}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    changes = {name: value - before[name] for name, value in trained_tensors(trainer.model).items()}
    logged = {name: evaluation[f"eval_{name}"] for name in (*METRICS, "aux_loss") if f"eval_{name}" in evaluation}
    return steps, logged, changes


def trained_tensors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def digest(changes):
    """Sum and norm of each tensor's change: those of the weights would hide it."""
    return {name: [tensor.sum().item(), tensor.norm().item()] for name, tensor in sorted(changes.items())}
