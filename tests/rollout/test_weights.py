"""What a server is sent of a policy in shards: every tensor as it is whole, and the shards stay what they are (R17)."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tether.reference.methods.shards import gathered
from tether.rollout.weights import lora_alone, write_adapter, write_merged
from tiny import tiny_model

TARGETS = {"r": 4, "target_modules": ["q_proj", "down_proj", "lm_head"], "task_type": "CAUSAL_LM"}
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def process():
    """A group of one process, which FSDP2 shards among."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def policy(kind):
    torch.manual_seed(0)
    if kind == "full":
        return tiny_model().eval()
    made = get_peft_model(tiny_model(), LoraConfig(**TARGETS, use_dora=kind == "dora", init_lora_weights=False)).eval()
    return made


@pytest.mark.parametrize("kind", ["full", "lora", "dora"])
def test_what_is_sent_of_shards_is_what_is_sent_of_the_whole(kind, process, tmp_path):
    """R17; nothing puts a gathered weight back into shards on the way."""
    whole, cut = policy(kind), policy(kind)
    layers = cut.model.layers if kind == "full" else cut.base_model.model.model.layers
    for layer in layers:
        fully_shard(layer)
    fully_shard(cut)
    assert any(isinstance(one, DTensor) for one in cut.parameters())
    write_merged(whole, tmp_path / "whole")
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
    with gathered(cut):
        write_merged(cut, tmp_path / "cut")
        if kind == "lora":
            assert lora_alone(cut) == ("default", 4)
            adapter = write_adapter(cut, "default", tmp_path / "adapter")
        assert not any(isinstance(one, DTensor) for one in cut.parameters()), "still whole"
    assert all(isinstance(one, DTensor) for one in cut.parameters()), "and in shards again"
    ours, theirs = load_file(tmp_path / "cut/model.safetensors"), load_file(tmp_path / "whole/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()]
    loaded += [PeftModel.from_pretrained(tiny_model(), str(adapter)).eval()] if kind == "lora" else []
    for one in loaded:
        with torch.no_grad():
            torch.testing.assert_close(one(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)
