"""Transformers still has the places that `tether.compat.transformers` names, and they do what is relied on."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations import deepspeed as integration
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config
from transformers.modeling_utils import PreTrainedModel

from tether.compat import transformers as places
from tiny import tiny_model
from tiny_vision import tiny_vision


def test_configurations_have__attn_implementation_and_sub_configs():
    model = tiny_model("llama", attn_implementation="sdpa")
    assert places.attention_of(model) == "sdpa"
    places.set_attention(model, "eager")
    assert places.attention_of(model) == "eager"


def test_set_attention_leaves_a_vision_tower_alone():
    model = tiny_vision("qwen2_vl")
    places.set_attention(model, "eager")
    tower = model.config.vision_config._attn_implementation
    places.set_attention(model, "sdpa")
    assert places.attention_of(model) == "sdpa"
    assert model.config.vision_config._attn_implementation == tower
    assert model.config.text_config is model.config.get_text_config()


def test_the_attention_tables_hold_what_is_registered():
    def function():
        return None

    AttentionInterface.register("tether_test", function)
    AttentionMaskInterface.register("tether_test", function)
    assert places.registered_attention("tether_test") is function
    assert places.registered_mask("tether_test") is function
    assert places.registered_attention("sdpa").__name__ == "sdpa_attention_forward"
    assert places.registered_mask("sdpa").__name__ == "sdpa_mask"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_eager_attention_stands_in_the_architectures_file(name):
    model = tiny_model(name, attn_implementation="eager")
    attention = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    found = places.eager_attention(attention[0])
    assert found is inspect.getmodule(type(model)).eager_attention_forward
    assert {"query", "key", "value", "attention_mask"} <= inspect.signature(found).parameters.keys()


def test_models_say_whether_they_are__is_stateful():
    assert places.carries_state(transformers.MambaForCausalLM) is True
    assert places.carries_state(tiny_model("llama")) is False


def test_models_list__keep_in_fp32_modules():
    with torch.device("meta"):
        t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1))
    assert places.kept_in_float32(t5) == ["wo"]
    assert places.kept_in_float32(tiny_model("llama")) == []
    assert PreTrainedModel._keep_in_fp32_modules_strict is None


@pytest.mark.xfail(
    strict=True, reason="transformers 5.23 resolves a revision once for a load and keeps the commit nowhere"
)
def test_configurations_keep__commit_hash(tmp_path):
    """A hub model in the cache, as a download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--some--model"
    tiny_model("llama").save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    loaded = AutoModelForCausalLM.from_pretrained("some/model", cache_dir=tmp_path, local_files_only=True)
    assert places.commit_of(loaded) == commit


def test_quantizers_note_is_quantized():
    from transformers.quantizers.base import HfQuantizer

    model = SimpleNamespace()
    assert places.is_quantized(model) is False
    assert 'setattr(model, "is_quantized", True)' in inspect.getsource(HfQuantizer)


def test_the_private_entries_of_a_configuration_are_known():
    """A private entry that is not among them would make two copies of one model differ."""

    def private(config):
        found = {key for key in config if key.startswith("_")}
        return found.union(*(private(value) for value in config.values() if isinstance(value, dict)))

    for model in (tiny_model("llama"), tiny_vision("qwen2_vl")):
        model.config.name_or_path = "somewhere"
        assert private(model.config.to_diff_dict()) | {"_name_or_path"} <= places.PRIVATE_CONFIG
        assert model.config._name_or_path == "somewhere"


def test_bart_adds_final_logits_bias_outside_its_head():
    shape = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 11}
    shape |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**shape)).eval()
    ids = torch.tensor([[5, 6, 2]])
    plain = model(input_ids=ids, decoder_input_ids=ids).logits
    places.logits_bias(model).add_(torch.arange(11.0))
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, plain + torch.arange(11.0))
    assert places.logits_bias(tiny_model("llama")) is None


def test_qwen2_vl_counts_positions_by_get_rope_index():
    count = places.image_positions(tiny_vision("qwen2_vl"))
    names = list(inspect.signature(count).parameters)
    assert names[:2] == ["input_ids", "mm_token_type_ids"]
    assert places.image_positions(tiny_model("llama")) is None


def test_architectures_have_load_balancing_loss_func():
    """Uniform routers: each expert gets its share, so that the loss is the number of experts a token is sent to."""
    loss = places.router_loss(tiny_model("mixtral"))
    logits = (torch.zeros(6, 4), torch.zeros(6, 4))
    assert loss(logits, attention_mask=torch.ones(2, 3)).item() == pytest.approx(2.0)
    assert places.router_loss(tiny_model("llama")) is None


def test_models_are_loaded_whole_without__hf_deepspeed_config_weak_ref():
    class Stage3:
        def is_zero3(self):
            return True

    settings = Stage3()
    set_hf_deepspeed_config(settings)
    try:
        assert is_deepspeed_zero3_enabled()
        with places.loading_whole():
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
        with places.loading_whole():
            other = Stage3()
            set_hf_deepspeed_config(other)  # as making an accelerator does
        assert integration._hf_deepspeed_config_weak_ref() is other
    finally:
        integration.unset_hf_deepspeed_config()
