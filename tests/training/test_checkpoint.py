"""Checkpoints whose tensors have other names on disk than in the model: experts, vision towers (INV-7)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError
from tether.training.checkpoint import load_renamed, require_parts
from tiny import _SHAPE, pair_rows, tiny_model, tiny_tokenizer

MIXTURES = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
}
TOKENIZER = tiny_tokenizer()


def mixture(name, seed=0):
    kind, fields = MIXTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{**_SHAPE, **fields, "vocab_size": len(TOKENIZER)})
    return AutoModelForCausalLM.from_config(config)


def run(folder, model, **changes):
    settings = {
        "max_steps": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        **changes,
    }
    return DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(folder), **settings),
        train_dataset=pair_rows(12),
        eval_dataset=pair_rows(3) if "eval_strategy" in changes else None,
        processing_class=TOKENIZER,
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_resumes_where_it_was(name, tmp_path):
    """INV-7: transformers alone warns of missing keys and trains on from the start's weights."""
    whole = run(tmp_path / "whole", mixture(name))
    whole.train()
    run(tmp_path / "half", mixture(name), save_strategy="steps", save_steps=2, max_steps=2).train()
    rest = run(tmp_path / "half", mixture(name))
    rest.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    for key, value in whole.policy.state_dict().items():
        assert torch.equal(value, rest.policy.state_dict()[key]), key


def test_the_best_model_is_loaded_under_its_names(tmp_path):
    trainer = run(
        tmp_path,
        mixture("mixtral"),
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # of a loss that falls, the first is kept
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    for key, value in trainer.policy.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_names_that_are_the_model_s_own_are_left_to_transformers(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert not load_renamed(tiny_model(), tmp_path)


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path):
    mixture("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "q_proj" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 2 tensors.*q_proj"):
        load_renamed(mixture("mixtral", seed=1), tmp_path)


@pytest.mark.parametrize(("wrote", "now", "said"), [(1, 1, 0), (2, 2, 0), (2, 1, 1), (1, 2, 1), (4, 2, 1)])
def test_another_number_of_processes_is_said(wrote, now, said, tmp_path, caplog):
    """Each has a random state of its own, and transformers silently begins one that is missing anew (INV-46)."""
    states = [f"rng_state_{rank}.pth" for rank in range(wrote)] if wrote > 1 else ["rng_state.pth"]
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", *states):
        (tmp_path / name).touch()
    require_parts(tmp_path, SimpleNamespace(world_size=now, process_index=0, save_only_model=False))
    assert caplog.text.count(f"another number of processes ({now})") == said
