"""Precision and products on a CPU: decided by a measurement, said, the same for every process and a resumed run."""

from __future__ import annotations

import json
import logging
import time

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

import tether.compute.precision as precision
from tether import DPOConfig, DPOTrainer
from tether.compute import cpu_matmul as products
from tether.errors import ConfigError
from tiny import pair_rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
needs_onednn = pytest.mark.skipif(not products.has_onednn(), reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def _own_library(monkeypatch):
    """A run sets the library for the process; it does not outlive its test."""
    monkeypatch.setattr(products, "_setting", {"library": "default"})


def trainer(folder, *, peft_config=None, **settings):
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
        peft_config=peft_config,
    )


@pytest.fixture
def able(monkeypatch):
    """A processor with the instructions, on which bfloat16 and oneDNN are measured to be as fast as the test says."""

    def measured(gain, library=1.0):
        monkeypatch.setattr(precision, "_LEAST_WEIGHT", 1)
        monkeypatch.setattr(precision, "processor_flags", lambda: frozenset({"avx512_bf16"}))
        seconds = {"default": 2.0 * library, "onednn": 2.0, "bfloat16": 2.0 / gain}
        monkeypatch.setattr(precision, "kept_seconds", lambda weight: seconds)

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
    assert not torch.equal(
        run.run.reference.score(run.run.probe).token_logps, exact.run.reference.score(exact.run.probe).token_logps
    )


@pytest.mark.parametrize("forced", [True, False])
def test_a_choice_is_kept_without_a_measurement(forced, able, tmp_path, monkeypatch):
    able(9.0)
    monkeypatch.setattr(precision, "kept_seconds", lambda weight: pytest.fail("measured all the same"))
    assert trainer(tmp_path, bf16=forced, cpu_matmul="default").args.bf16 is forced


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


def test_a_busy_machine_decides_as_it_did_when_it_was_measured(tmp_path, monkeypatch, caplog):
    """Of one CPU, version of torch and shape, the first measurement counts, whatever the number of threads."""
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path))
    found = iter([{"default": 2.0, "onednn": float("inf"), "bfloat16": 1.0}, {"default": 1.0, "onednn": 1.0}])
    monkeypatch.setattr(precision, "product_seconds", lambda weight: next(found))
    first = precision.kept_seconds(torch.zeros(8, 4))
    assert (
        precision.kept_seconds(torch.ones(8, 4)) == first == {"default": 2.0, "onednn": float("inf"), "bfloat16": 1.0}
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert precision.kept_seconds(torch.zeros(8, 4)) == first
    assert precision.kept_seconds(torch.zeros(4, 8)) == {"default": 1.0, "onednn": 1.0}
    (one, other) = (tmp_path / "products").glob("*.json")
    again = iter([{"default": 3.0}])
    monkeypatch.setattr(precision, "product_seconds", lambda weight: next(again))
    one.write_text("{half")
    other.write_text("[]")
    assert precision.kept_seconds(torch.zeros(8, 4)) == {"default": 3.0}


def test_a_machine_that_is_busy_now_is_measured_alike(monkeypatch):
    """Ways are timed on one thread in its own time: what it waits for others does not count, and threads come back."""
    linear, counts = nn.functional.linear, []

    def waiting(inputs, matrix):
        counts.append(torch.get_num_threads())
        if matrix.dtype == torch.float32:
            time.sleep(0.02)
        return linear(inputs, matrix)

    monkeypatch.setattr(nn.functional, "linear", waiting)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert precision.product_seconds(torch.zeros(64, 64))["default"] < 0.01
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(counts) == {1}


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(precision, "product_seconds", lambda weight: {"default": 1.0})
    assert precision.kept_seconds(torch.zeros(8, 4)) == {"default": 1.0}
    assert "cannot be kept" in caplog.text


@pytest.mark.slow
def test_the_measurement_uses_the_layers(monkeypatch):
    """Neither embeddings nor head, which are larger; and a slower product is seen as one."""
    model = tiny_model()
    ends = {model.get_input_embeddings().weight.data_ptr(), model.get_output_embeddings().weight.data_ptr()}
    weight = precision.widest_weight(model)
    assert weight is not None
    assert weight.data_ptr() not in ends
    linear = nn.functional.linear

    def often(inputs, matrix):
        for _ in range(20 if matrix.dtype == torch.bfloat16 else 0):
            linear(inputs, matrix)
        return linear(inputs, matrix)

    monkeypatch.setattr(nn.functional, "linear", often)
    seconds = precision.product_seconds(torch.randn(256, 256))
    assert seconds["bfloat16"] > seconds["default"]
    monkeypatch.setattr(precision, "has_onednn", lambda: False)
    assert precision.product_seconds(torch.randn(256, 256))["onednn"] == float("inf")


def test_quantised_weights_are_not_measured():
    """Packed numbers are no matrix to multiply with; what is left of such a model is narrow."""
    model = tiny_model()
    widest = precision.widest_weight(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            packed = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
            module.weight = nn.Parameter(packed, requires_grad=False)
    assert widest is not None
    assert precision.widest_weight(model) is None
    narrow = get_peft_model(tiny_model(), LoraConfig(r=1, target_modules=["q_proj"]))
    for module in narrow.modules():
        if type(module) is nn.Linear and module.weight.numel() > 32:
            module.weight.data = module.weight.data.bfloat16()
    assert precision.widest_weight(narrow).numel() == 32


@needs_onednn
def test_the_faster_library_is_used_and_said(able, tmp_path, caplog):
    """At 1.05 and above oneDNN, which is float32 as well; bfloat16 is then held against it, and said alone where it is
    chosen."""
    caplog.set_level(logging.INFO, logger="tether")
    able(1.0, library=1.04)
    trainer(tmp_path / "near")
    assert products.products() == "default"
    able(1.2, library=1.06)
    run = trainer(tmp_path / "far")
    assert products.products() == "onednn"
    assert "; by oneDNN's products, measured 1.06x torch's default products; set cpu_matmul to choose)" in caplog.text
    assert any(isinstance(module, products.OneDnnLinear) for module in run.policy.modules())
    caplog.clear()
    able(1.4, library=2.2)
    assert trainer(tmp_path / "narrow").args.mixed_precision == "bf16"
    assert "oneDNN" not in caplog.text


@needs_onednn
@pytest.mark.parametrize(("forced", "name"), [("default", "torch's default"), ("onednn", "oneDNN's")])
def test_a_library_that_was_chosen_is_not_measured(forced, name, able, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="tether")
    able(9.0, library=9.0)
    monkeypatch.setattr(precision, "product_seconds", lambda weight: pytest.fail("measured all the same"))
    trainer(tmp_path, bf16=False, cpu_matmul=forced)
    assert products.products() == forced
    assert f"precision: float32 (by {name} products)" in caplog.text


def test_a_library_that_is_not_known_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cpu_matmul is 'mkl'; allowed are auto, default, onednn"):
        trainer(tmp_path, cpu_matmul="mkl")
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    with pytest.raises(ConfigError, match="was built without it"):
        trainer(tmp_path, cpu_matmul="onednn")


@pytest.mark.sweep(1)
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_a_run_by_onednn_is_the_run_by_default(adapter, onednn, tmp_path):
    """Losses and weights of steps with gradient checkpointing, every product of them by oneDNN, however small."""
    found = {}
    config = LoraConfig(r=4, target_modules="all-linear") if adapter else None
    for library in ("default", "onednn"):
        torch.manual_seed(0)
        run = trainer(tmp_path / library, peft_config=config, bf16=False, cpu_matmul=library, logging_steps=1)
        run.train()
        assert bool(onednn) == (library == "onednn")
        losses = [row["loss"] for row in run.state.log_history if "loss" in row]
        found[library] = losses, {name: p.detach() for name, p in run.policy.named_parameters() if p.requires_grad}
    (losses, weights), (others, other_weights) = found.values()
    assert others == pytest.approx(losses, abs=1e-5)
    assert weights.keys() == other_weights.keys()
    # Adam divides by the root of a gradient's square: rounding of a gradient near zero may turn its step round.
    differences = torch.cat([(weights[name] - other_weights[name]).abs().flatten() for name in weights])
    assert differences.quantile(0.99) < 1e-5
