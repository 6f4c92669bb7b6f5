"""Quantised bases on a CPU: after a reference pass the policy still trains (INV-4, 5). `make test-quantized` runs it.

bitsandbytes repacks 4-bit weights in a forward in evaluation mode on processors with AVX512-BF16, after which layers
give no gradient, silently; a reference pass is such a forward.
"""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

from policies import PROBE, take_steps
from quantized import KINDS, needs_bitsandbytes
from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError
from tether.models.quantized import quantization_config
from tether.models.structure import evaluation_mode
from tether.reference import SAME, ReferenceSpec, compare_with_start, resolve
from tether.scoring import score
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

# The packages warn of what they would like to find on other machines.
pytestmark = pytest.mark.filterwarnings("ignore")


def quantized(folder, kind, **changes):
    """A tiny model, saved and read back quantised."""
    tiny_model(hidden_size=64, intermediate_size=128, **changes).save_pretrained(folder)
    config = quantization_config(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def policy_on(base, **changes):
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM", **changes}
    return get_peft_model(base, LoraConfig(**settings))


@pytest.mark.parametrize("method", ["adapter_off", "snapshot"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_trains_after_a_reference_pass(kind, method, tmp_path):
    """The gradient after a reference pass is the gradient before it, for every trainable tensor."""
    policy = policy_on(quantized(tmp_path, kind))
    policy.train()
    assert any("int" in str(tensor.dtype) for tensor in policy.state_dict().values()) or kind == "int8"

    def gradients():
        policy.zero_grad()
        score(policy, PROBE).logps.sum().backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}

    before = gradients()
    with torch.no_grad():
        start = score(policy, PROBE).token_logps
    reference = resolve(ReferenceSpec(method=method), policy, PROBE, score, lambda model: score).reference
    assert compare_with_start(policy, reference, score, PROBE, SAME).passed
    after = gradients()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert any(value.abs().max() > 0 for value in after.values())
    assert take_steps(policy) > 1e-3
    torch.testing.assert_close(reference.score(PROBE).token_logps, start, atol=SAME, rtol=0)


@needs_bitsandbytes
def test_weights_that_were_repacked_for_inference_come_back(tmp_path):
    """Whoever loaded the model has generated with it: on AVX512-BF16 its 4-bit weights have no backward by then."""
    base = quantized(tmp_path, "4bit")
    layers = [module for module in base.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert layers
    able = layers[0].support_avx512bf16_for_cpu
    with torch.no_grad():
        base.eval()(torch.arange(10)[None] + 4)
    packed = [getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers]
    assert packed == [able] * len(layers)
    policy = policy_on(base)
    reference = resolve(ReferenceSpec(), policy, PROBE, score, lambda model: score).reference
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    policy.train()
    score(policy, PROBE).logps.sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)
    assert compare_with_start(policy, reference, score, PROBE, SAME).passed


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_quantised_base(kind, tmp_path):
    """QLoRA through the trainer: loss ln 2 at the first step, the reference stays, the loss falls."""
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    base = quantized(tmp_path / "base", kind, **sizes)
    if kind != "int8":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    run = DPOTrainer(
        model=base,
        args=DPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=4,
            max_steps=5,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            **QUIET,
            reference_check_steps=1,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(pair_rows(12)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert run.run.reference.identity.method == "adapter_off"
    run.train()
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]


@needs_bitsandbytes
def test_the_repacking_is_switched_off(tmp_path, monkeypatch):
    """On any processor: layers that were made as where it is done keep their weights as they are."""
    import bitsandbytes.nn.modules as modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    policy = policy_on(quantized(tmp_path, "4bit"))
    layers = [module for module in policy.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert layers
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    with evaluation_mode(policy), torch.no_grad():
        score(policy, PROBE)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)


@needs_bitsandbytes
def test_a_quantised_reference_beside_a_full_policy(tmp_path):
    """`reference: {model: …, quantization: 4bit}`: its own dtype, the policy stays as it is."""
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tiny_model(hidden_size=64, intermediate_size=128, **sizes).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    policy = tiny_model(hidden_size=64, intermediate_size=128, **sizes)
    run = DPOTrainer(
        model=policy,
        ref_model=str(tmp_path / "other"),
        args=DPOConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            ref_model_init_kwargs={"quantization": "4bit", "dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(pair_rows(12)),
        processing_class=tokenizer,
    )
    with torch.no_grad():
        exact = score(policy, run.run.probe).token_logps
    difference = (run.run.reference.score(run.run.probe).token_logps - exact).abs().max().item()
    assert 1e-3 < difference < 5, "quantised, and still that model"
    run.train()


def test_a_quantisation_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="allowed are 4bit, nf4, 8bit, int8 and none"):
        quantization_config("2bit")
    monkeypatch.setattr("tether.models.quantized.find_spec", lambda name: None)
    for name, package in (("4bit", "bitsandbytes"), ("int8", "torchao")):
        with pytest.raises(ConfigError, match=rf"needs {package}.*tether\[quantization\]"):
            quantization_config(name)
