"""PEFT still has the places that `tether.compat.peft` names, and they do what is relied on."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from tether.compat import peft as places
from tiny import tiny_model

NAME = "model.layers.0.self_attn.q_proj"


def adapted(**changes):
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False, **changes}
    return get_peft_model(tiny_model(), LoraConfig(**settings))


def layer(model):
    return model.base_model.model.get_submodule(NAME)


def test_adapter_layer_names_name_what_was_added():
    found = {name for name, _ in places.added_parameters(layer(adapted()))}
    assert found == {"lora_A.default.weight", "lora_B.default.weight"}
    assert [*places.added_parameters(nn.Linear(1, 1))] == []


def test_originals_lie_under_base_layer_original_module_and_token_adapter():
    model = adapted(modules_to_save=["lm_head"], trainable_token_indices=[3])
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, places.ADDED)}
    assert {"ModulesToSaveWrapper", "TrainableTokensWrapper"} <= kinds
    plain = dict(tiny_model().named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, places.ADDED):
            under = places.layer_under(module)
            assert not isinstance(under, places.ADDED)
            assert any(under.weight.shape == weight.shape for weight in plain.values()), name
            assert any(places.is_original(module, child) for child, _ in module.named_children()), name


def test_a_layer_merges_alone_as_the_model_does():
    model = adapted()
    before = copy.deepcopy(layer(model).state_dict())
    merged = places.merged_layer(layer(model))
    whole = copy.deepcopy(model).merge_and_unload().get_submodule(NAME)
    torch.testing.assert_close(merged.weight, whole.weight)
    assert not torch.equal(merged.weight, layer(model).base_layer.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer(model).state_dict().items())


def test_values_of_few_tokens_are_found_beside_what_they_replace():
    model = adapted(modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    pairs = [pair for module in model.modules() for pair in places.values_of_few_tokens(module)]
    assert sorted(tuple(learnt.shape) for learnt, _ in pairs) == sorted(
        [tuple(tiny_model().lm_head.weight.shape), (2, tiny_model().config.hidden_size)]
    )
    assert all(torch.equal(learnt, original) for learnt, original in pairs)
    on_embeddings = adapted(target_modules=["embed_tokens"])
    ((delta, zero),) = [pair for module in on_embeddings.modules() for pair in places.values_of_few_tokens(module)]
    assert delta.abs().max() > 0
    assert not zero.any()


@pytest.mark.parametrize("trains", [True, False])
def test_the_tuner_sets_several_adapters_and_whether_they_train(trains):
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for names in (["default", "second"], ["second"]):
        places.set_active(model, names, trains=trains)
        assert layer(model).active_adapters == names
        training = {name.split(".")[-2] for name, tensor in model.named_parameters() if tensor.requires_grad}
        assert training == (set(names) if trains else set())


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["lora", "prefix"],
)
def test_what_set_peft_model_state_dict_would_set_is_listed_and_nothing_is_set(config):
    model = get_peft_model(tiny_model(), config)
    saved = {name: tensor + 1 for name, tensor in get_peft_model_state_dict(model).items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, lost = places.restored_tensors(model, saved, "default")
    assert lost == []
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert set(found) == trained
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
