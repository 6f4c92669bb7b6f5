"""Preference training of T5 and BART, end to end: references, guards, checkpointing, resumption, artefacts."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSeq2SeqLM, LoraConfig
from transformers import AutoModelForSeq2SeqLM

from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError
from tether.models import load_policy
from tether.models.structure import evaluation_mode
from tether.scoring import score
from tiny import QUIET, pair_rows
from tiny_seq2seq import tiny_seq2seq, tiny_seq2seq_tokenizer

FAMILIES = ["t5_tied", "bart"]


def policy(family, **changes):
    return tiny_seq2seq(family, vocab_size=len(tiny_seq2seq_tokenizer(family)), **changes)


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM", **changes})


def trainer(folder, family, model=None, *, peft_config=None, **changes):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        **QUIET,
        "reference_check_steps": 2,
        **changes,
    }
    return DPOTrainer(
        model=policy(family) if model is None else model,
        args=DPOConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(pair_rows(12)),
        processing_class=tiny_seq2seq_tokenizer(family),
        peft_config=peft_config,
    )


def losses(run):
    return [log["loss"] for log in run.state.log_history if "loss" in log]


def weights(run):
    return {name: p.detach().clone() for name, p in run.policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(("adapter", "method"), [(None, "snapshot"), ("lora", "adapter_off"), ("lora", "snapshot")])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sweep(1)
def test_dpo_starts_at_its_reference_and_learns(family, adapter, method, checkpointing, tmp_path):
    """INV-1, 2, 5: ln 2 at step 1, a reference that does not move, weights that do, in encoder and decoder."""
    run = trainer(
        tmp_path,
        family,
        peft_config=lora() if adapter else None,
        reference="start",
        reference_method=method,
        gradient_checkpointing=checkpointing,
    )
    before = weights(run)
    run.train()
    assert run.run.layout == "encoder_decoder"
    assert run.run.reference.identity.method == method
    assert run.guard.passed
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(run)[-1] < math.log(2)
    moved = [name for name, value in weights(run).items() if not torch.equal(value, before[name])]
    assert any("encoder.block" in name or "encoder.layers" in name for name in moved)
    assert any("decoder.block" in name or "decoder.layers" in name for name in moved)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing(family, tmp_path):
    """INV-21, in whole runs."""
    runs = [trainer(tmp_path / str(on), family, gradient_checkpointing=on) for on in (False, True)]
    for run in runs:
        run.train()
    torch.testing.assert_close(losses(runs[0]), losses(runs[1]), atol=1e-5, rtol=0)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_ends_where_the_whole_one_does(family, tmp_path):
    """INV-7, exactly."""
    whole = trainer(tmp_path / "whole", family)
    whole.train()
    trainer(tmp_path / "half", family, save_strategy="steps", save_steps=2, max_steps=2).train()
    rest = trainer(tmp_path / "half", family)
    rest.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(rest)[name]), name


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sweep(1)
def test_the_artefact_scores_as_the_model_did(family, adapter, tmp_path):
    """INV-38: in plain transformers and peft, and through `load_policy`."""
    policy(family).save_pretrained(tmp_path / "base")
    base = load_policy(tmp_path / "base")
    run = trainer(tmp_path / "run", family, base, peft_config=lora(task_type=None) if adapter else None)
    run.train()
    run.save_model()
    kind = AutoPeftModelForSeq2SeqLM if adapter else AutoModelForSeq2SeqLM
    with torch.no_grad(), evaluation_mode(run.policy):
        expected = score(run.policy, run.run.probe, layout="encoder_decoder").token_logps
        for model in (kind.from_pretrained(tmp_path / "run"), load_policy(tmp_path / "run", dtype="float32")):
            found = score(model.eval(), run.run.probe, layout="encoder_decoder").token_logps
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_another_model_as_reference_is_scored_in_its_layout(tmp_path):
    run = trainer(tmp_path, "t5_tied")
    other = DPOTrainer(
        model=policy("t5_tied"),
        ref_model=policy("t5_tied", seed=1),
        args=DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=1, disable_tqdm=True),
        train_dataset=Dataset.from_list(pair_rows(12)),
        processing_class=tiny_seq2seq_tokenizer("t5_tied"),
    )
    assert other.run.reference.identity.method == "model"
    difference = (
        other.run.reference.score(run.run.probe).token_logps - run.run.reference.score(run.run.probe).token_logps
    )
    assert difference.abs().max() > 0.1


def test_an_adapter_for_another_task_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="SEQ_2_SEQ_LM"):
        trainer(tmp_path, "bart", peft_config=lora(task_type="CAUSAL_LM"))
