"""bfloat16 on a CPU: decided by a measurement, said, the same for every process and for a resumed run."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from datasets import Dataset
from torch import nn

import tether.training.precision as precision
from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError
from tiny import pair_rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def trainer(folder, **settings):
    model = tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    defaults = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-3,
        "reference_check_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(folder), **{**defaults, **settings}),
        train_dataset=Dataset.from_list(pair_rows(8)),
        processing_class=TOKENIZER,
    )


@pytest.fixture
def able(monkeypatch):
    """A processor with the instructions, on which bfloat16 is measured to be as fast as the test says."""

    def measured(gain):
        monkeypatch.setattr(precision, "_LEAST_WEIGHT", 1)
        monkeypatch.setattr(precision, "processor_flags", lambda: frozenset({"avx512_bf16"}))
        monkeypatch.setattr(precision, "bfloat16_gain", lambda weight: gain)

    return measured


def test_a_tiny_model_stays_in_float32(tmp_path, caplog):
    """So the whole test suite does, on any machine."""
    caplog.set_level(logging.INFO, logger="tether")
    run = trainer(tmp_path)
    assert (run.args.bf16, run.args.mixed_precision) == (False, "no")
    assert next(line for line in caplog.messages if line.startswith("precision:")).startswith("precision: float32 (")


def test_a_measured_gain_decides(able, tmp_path, caplog):
    """At 1.3 and above bfloat16, with every guard: start equality, the frozen probe, a change in step 1."""
    caplog.set_level(logging.INFO, logger="tether")
    able(1.2)
    assert trainer(tmp_path / "slow").args.mixed_precision == "no"
    able(2.44)
    run = trainer(tmp_path / "fast")
    assert "precision: bfloat16 autocast (measured 2.4x float32's matmul rate" in caplog.text
    assert run.accelerator.mixed_precision == "bf16"
    assert run.state.global_step == 0
    run.train()
    assert run.guard is not None
    assert run.guard.max_difference == 0.0
    assert {p.dtype for p in run.policy.parameters()} == {torch.float32}
    # It is really computed in: a forced float32 run gives other numbers.
    exact = trainer(tmp_path / "exact", bf16=False)
    assert not torch.equal(run.resolved.reference.score(run._probe), exact.resolved.reference.score(exact._probe))


@pytest.mark.parametrize("forced", [True, False])
def test_a_choice_is_kept_without_a_measurement(forced, able, tmp_path, monkeypatch):
    able(9.0)
    monkeypatch.setattr(precision, "_decide", lambda model: pytest.fail("measured all the same"))
    assert trainer(tmp_path, bf16=forced).args.bf16 is forced


def test_without_the_instructions_it_is_float32(able, tmp_path, monkeypatch):
    able(9.0)
    monkeypatch.setattr(precision, "processor_flags", frozenset)
    assert trainer(tmp_path).args.bf16 is False


def test_a_resumed_run_keeps_its_precision(able, tmp_path):
    """INV-7: on a machine that decides otherwise, resuming says what to set; with that set, it goes on exactly."""
    able(2.0)
    whole = trainer(tmp_path)
    whole.train()
    checkpoint = tmp_path / "checkpoint-1"
    assert json.loads((checkpoint / "precision.json").read_text()) == {"mixed_precision": "bf16"}
    able(1.0)
    with pytest.raises(ConfigError, match="Set bf16=True and fp16=False to go on as it began"):
        trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    resumed = trainer(tmp_path / "again", bf16=True)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = dict(whole.policy.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in resumed.policy.named_parameters())


def test_the_measurement_uses_the_layers(monkeypatch):
    """Neither embeddings nor head, which are larger; and a slower product is seen as one."""
    model = tiny_model()
    ends = {model.get_input_embeddings().weight.data_ptr(), model.get_output_embeddings().weight.data_ptr()}
    weight = precision.widest_weight(model)
    assert weight is not None
    assert weight.data_ptr() not in ends
    linear = nn.functional.linear

    def twice(inputs, matrix):
        for _ in range(20 if matrix.dtype == torch.bfloat16 else 0):
            linear(inputs, matrix)
        return linear(inputs, matrix)

    monkeypatch.setattr(nn.functional, "linear", twice)
    assert precision.bfloat16_gain(torch.randn(256, 256)) < 1.0
