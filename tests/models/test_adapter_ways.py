"""Adapters that transformers put into a model, and what of a base an adapter rewrote: both are measured."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM

from policies import resolved, with_lora
from tether.errors import ConfigError, ReferencePolicyError
from tether.models import model_fingerprint
from tether.models.adapters import continue_adapter, in_one_way, refuse_nameless_layers, rewrites_base, taken_out
from tether.models.fingerprint import base_tensors, fingerprint
from tether.models.fingerprint_files import checkpoint_fingerprint
from tether.models.structure import adapter_tensors, adapters_off
from tether.reference.methods.adapter_check import acting_layer, rewritten_base
from tether.scoring import pack, score_alone
from tether.training.setup.reference import base_fingerprint
from tiny import ragged_examples, tiny_model

BATCH = pack(ragged_examples())
INITS = ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian", True]


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})


def injected(*names, **changes):
    """A model into which transformers has put adapters that hold something."""
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a second adapter
        for name in names:
            model.add_adapter(lora(**changes), name)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def alone(model):
    with torch.no_grad():
        return score_alone(model, BATCH)


@pytest.mark.parametrize("names", [("default",), ("mine",), ("one", "two")], ids=str)
def test_an_adapter_of_transformers_is_pefts_without_a_change(names):
    """The same function, on and off; the same tensors, of which the same train; several stay in effect."""
    model = injected(*names)
    if len(names) > 1:
        model.set_adapter(list(names))
    plain = alone(tiny_model().eval())
    with adapters_off(model):
        torch.testing.assert_close(alone(model), plain)
    before, trains = alone(model), {id(p) for p in model.parameters() if p.requires_grad}
    assert (before - plain).abs().max() > 1e-2
    assert model_fingerprint(model, without_adapters=True) == model_fingerprint(tiny_model(), without_adapters=False)
    policy = in_one_way(model)
    assert isinstance(policy, PeftModel)
    assert policy.active_adapters == list(names)
    assert torch.equal(alone(policy), before)
    assert {id(p) for p in policy.parameters() if p.requires_grad} == trains
    assert {id(p) for p in adapter_tensors(policy).values()} >= trains
    with adapters_off(policy):
        torch.testing.assert_close(alone(policy), plain)


def test_what_it_saves_is_an_adapter_that_plain_peft_loads(tmp_path):
    """By its own name, and without what transformers noted on the model."""
    model = injected("mine")
    before = alone(model)
    in_one_way(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "mine", adapter_name="mine")
    assert torch.equal(alone(again.eval()), before)


def test_a_model_loaded_from_an_adapters_folder(tmp_path):
    """Report: huggingface/trl#872. `from_pretrained` of transformers reads the base and injects the adapter."""
    tiny_model().save_pretrained(tmp_path / "base")
    first = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora(init_lora_weights=False))
    first.save_pretrained(tmp_path / "sft")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft", dtype=torch.float32)
    assert torch.equal(alone(in_one_way(model)), alone(first.eval()))


def test_layers_of_an_adapter_that_nothing_describes_are_refused():
    """They would train, and nothing could load what is saved of them."""
    refuse_nameless_layers(tiny_model())
    refuse_nameless_layers(get_peft_model(tiny_model(), lora()))
    model = inject_adapter_in_model(lora(), tiny_model())
    with pytest.raises(ConfigError, match=r"layers of an adapter, such as model\.layers\.0\.self_attn\.q_proj, and no"):
        refuse_nameless_layers(model)


def test_a_file_with_more_than_has_a_place_is_refused(tmp_path):
    """PEFT passes over it silently: the adapter would be another one than was trained."""
    in_one_way(injected("default")).save_pretrained(tmp_path)
    whole = continue_adapter(tiny_model(), tmp_path)
    assert isinstance(whole, PeftModel)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "target_modules": config["target_modules"][:1]}))
    with pytest.raises(ConfigError, match=r"holds \d+ tensors that have no place in this model"):
        continue_adapter(tiny_model(), tmp_path)


def test_an_adapter_that_was_merged_into_its_base_is_beside_it_again():
    model = in_one_way(injected("default"))
    before, told = alone(model), dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in told.items()}
    model.merge_adapter()
    assert any(not torch.equal(parameter, values[name]) for name, parameter in told.items())
    assert taken_out(model) is model
    torch.testing.assert_close(alone(model), before)
    for name, parameter in told.items():
        torch.testing.assert_close(parameter.detach(), values[name])
    score_alone(model, BATCH).sum().backward()
    assert all(parameter.grad is not None for parameter in told.values() if parameter.requires_grad)


def test_adapters_of_two_kinds_are_refused():
    model = injected("one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a second adapter
        model.add_adapter(IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "two")
    with pytest.raises(ConfigError, match="adapters of 2 kinds"):
        in_one_way(model)


@pytest.mark.parametrize("init", INITS, ids=str)
def test_a_rewritten_base_is_measured(init, tmp_path):
    """By the base's fingerprint before and after, and against its files; what the list says agrees with it."""
    tiny_model().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    before, tensors = model_fingerprint(base, without_adapters=True), fingerprint(base_tensors(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = get_peft_model(base, lora(init_lora_weights=init))
    rewritten = fingerprint(base_tensors(policy)) != tensors
    assert rewritten == rewrites_base(policy.peft_config["default"])
    assert bool(rewritten_base(policy, before)) == rewritten
    assert base_fingerprint(policy, None) == before == checkpoint_fingerprint(tmp_path)
    assert bool(rewritten_base(policy, base_fingerprint(policy, None))) == rewritten


def test_a_base_is_compared_whatever_wrote_into_it(tmp_path):
    """No initialisation says anything here; and without a source there is nothing to compare with."""
    tiny_model().save_pretrained(tmp_path)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), lora())
    with torch.no_grad():
        policy.get_base_model().model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert "or something else" in rewritten_base(policy, base_fingerprint(policy, None))
    assert base_fingerprint(with_lora(), None) is None


@pytest.mark.parametrize(("dtype", "held"), [(torch.float32, 1e-3), (torch.bfloat16, 5.0)])
def test_a_zero_adapter_is_told_by_its_layers(dtype, held):
    """A layer that holds something on tokens that no probe has, or that acts by more than it is given alone."""
    policy = with_lora().to(dtype)
    assert acting_layer(policy) == ""
    with torch.no_grad():
        next(p for name, p in policy.named_parameters() if "lora_B" in name)[0, 0] = held
    assert "q_proj' already holds something" in acting_layer(policy)
    activated = with_lora(alora_invocation_tokens=[5, 6]).to(dtype)
    assert "acts by what is in a row" in acting_layer(activated)
    assert acting_layer(tiny_model()) == ""
    with pytest.raises(ReferencePolicyError, match="acts by what is in a row"):
        resolved(activated, method="adapter_off")
