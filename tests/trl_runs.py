"""Runs of Tether's and TRL's trainers on the same rows, and their comparison number by number."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tiny import QUIET, tiny_model, tiny_tokenizer

SETTINGS = {
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 100,
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    **QUIET,
    "gradient_checkpointing": False,
    "bf16": False,
}


def policy(seed: int = 0) -> Any:
    """A tiny model that fits the tiny tokenizer."""
    return tiny_model(seed=seed, vocab_size=len(tiny_tokenizer()), pad_token_id=0, bos_token_id=1, eos_token_id=2)


def experimental(name: str) -> tuple[Any, Any]:
    """Trainer and configuration of `trl.experimental`, which warns that it may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"trl.experimental.{name}")
    return getattr(module, f"{name.upper()}Trainer"), getattr(module, f"{name.upper()}Config")


def without_bos() -> Any:
    """The tiny tokenizer without a BOS token."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    return tokenizer


class Result:
    """What a run logged at each step, its evaluation, and how each trained tensor changed."""

    def __init__(self, trainer: Any, evaluate: bool) -> None:
        before = _tensors(trainer)
        trainer.train()
        self.evaluation = trainer.evaluate() if evaluate else {}
        self.args = trainer.args
        self.steps = [log for log in trainer.state.log_history if "loss" in log]
        self.changes = {name: value - before[name] for name, value in _tensors(trainer).items()}


def run(trainer_class: Any, config_class: Any, folder: Path, rows: list[dict[str, Any]], **arguments: Any) -> Result:
    """Train for 3 SGD steps on ragged rows; settings are told from the trainer's arguments by their names."""
    fields = config_class.__dataclass_fields__
    settings = {**SETTINGS, **{name: arguments.pop(name) for name in list(arguments) if name in fields}}
    evaluation = arguments.pop("evaluation", None)
    tokenizer = arguments.pop("processing_class", None) or tiny_tokenizer()
    # TRL and peft warn of their own and each other's renamed arguments.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            model=arguments.pop("model", None) or policy(),
            args=config_class(output_dir=str(folder), **settings),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(evaluation) if evaluation else None,
            processing_class=tokenizer,
            **arguments,
        )
        return Result(trainer, bool(evaluation))


def assert_equal(ours: Result, theirs: Result, metrics: tuple[str, ...], *, unlike: tuple[str, ...] = ()) -> None:
    """Loss, gradient norm, the metrics and the weights' changes within 1e-4; each metric is one that both log.

    Args:
        metrics: names besides `loss`, `grad_norm` and `num_tokens`.
        unlike: names that TRL logs too and that differ for a reason (`docs/conventions.md`).
    """
    assert len(ours.steps) == len(theirs.steps) == 3
    logged = set(theirs.steps[0]) - {"epoch", "step", "learning_rate", "tokens_per_second", "memory_peak_gib"}
    assert logged <= {"loss", "grad_norm", "num_tokens", *metrics, *unlike}, "a metric of TRL's is not compared"
    for mine, their in zip(ours.steps, theirs.steps, strict=True):
        for name in ("loss", "grad_norm", *metrics):
            assert mine[name] == pytest.approx(their[name], abs=1e-4, rel=1e-4), name
        if "num_tokens" in their and "num_tokens" not in unlike:
            assert mine["num_tokens"] == their["num_tokens"]
    assert ours.changes.keys() == theirs.changes.keys()
    assert any(change.abs().max() > 1e-4 for change in ours.changes.values()), "nothing was trained"
    for name, change in ours.changes.items():
        torch.testing.assert_close(change, theirs.changes[name], atol=1e-4, rtol=1e-4)
    for name in ("loss", *metrics):
        key = f"eval_{name}"
        if key in theirs.evaluation and name not in unlike:
            assert ours.evaluation[key] == pytest.approx(theirs.evaluation[key], abs=1e-4, rel=1e-4), key


def _tensors(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
