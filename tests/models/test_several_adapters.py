"""`model.adapter: [a, b]`: adapters on one another are the model in which each was merged before the next was made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tether.config.model_names import named_model
from tether.errors import ConfigError
from tether.evaluate.merge import merge
from tether.models.adapters import TRAINED, continue_adapter, stack_adapter, write_active
from tether.models.structure import adapter_on, trainable_tensors
from tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(3, 40).unsqueeze(0)
KINDS = {
    "a": {"r": 4},
    "b": {"r": 2, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "c": {"r": 8, "lora_alpha": 32},
    "dora": {"r": 4, "use_dora": True},
    "whole": {"r": 4, "modules_to_save": ["lm_head"]},
}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, and adapters that each move it."""
    monkeypatch.chdir(tmp_path)
    tiny_model(vocab_size=len(tiny_tokenizer())).save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    for seed, (name, options) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        given = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
        model = get_peft_model(base(), LoraConfig(**given))
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
    return tmp_path


def base():
    return AutoModelForCausalLM.from_pretrained("base")


def values(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def merged(*names: str) -> Tensor:
    """What PEFT gives where each adapter is merged before the next one is loaded."""
    model = base()
    for name in names:
        model = PeftModel.from_pretrained(model, name).merge_and_unload()
    return values(model)


@pytest.mark.usefixtures("folders")
def test_several_adapters_are_the_model_in_which_they_were_merged() -> None:
    for names in (("b", "a"), ("a", "b", "c")):
        policy = continue_adapter(base(), names)
        torch.testing.assert_close(values(policy), merged(*names), rtol=1e-4, atol=1e-5)
        assert {name.split(".")[-2] for name in trainable_tensors(policy)} == {TRAINED}
    assert not torch.allclose(merged("a", "b"), merged("b"), atol=1e-2)
    policy = continue_adapter(base(), ["a", "b"])
    with adapter_on(policy, "frozen"):
        torch.testing.assert_close(values(policy), merged("a"), rtol=1e-4, atol=1e-5)
    over = stack_adapter(base(), ["a", "b"], LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.testing.assert_close(values(over), merged("a", "b"), rtol=1e-4, atol=1e-5)
    over.save_pretrained("over")
    write_active(over, "over")
    again = continue_adapter(base(), ["c", "over"])
    torch.testing.assert_close(values(again), merged("c", "a", "b"), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "dora"], "The adapter 'dora' is DoRA, which several adapters cannot have .* --base FOLDER"),
        (["dora", "a"], "The adapter 'dora' is DoRA"),
        (["whole", "a"], "The adapter 'whole' is LORA with modules of its own"),
        (["a", "b", "a"], "The adapters 'a' and 'a' have the same weights, which would count twice"),
    ],
)
def test_adapters_that_are_no_sum_are_refused_with_the_way_out(names: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        continue_adapter(base(), names)
    with pytest.raises(ConfigError, match=said):
        stack_adapter(base(), names, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.slow
@pytest.mark.usefixtures("folders")
def test_merging_one_after_the_other_gives_the_same() -> None:
    """What the message above advises."""
    merge(named_model("dora"), Path("first"))
    merge(replace(named_model("b"), base="first"), Path("second"))
    found = values(AutoModelForCausalLM.from_pretrained("second"))
    torch.testing.assert_close(found, merged("dora", "b"), rtol=1e-4, atol=1e-5)
