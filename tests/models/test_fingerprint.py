"""The fingerprint of a policy: equal for equal weights, whatever carries them, and different otherwise."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tether.errors import ReferencePolicyError
from tether.models.fingerprint import base_tensors, fingerprint, model_fingerprint
from tether.models.fingerprint_files import checkpoint_fingerprint
from tiny import tiny_model


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"a": torch.randn(5, 7, generator=generator), "b": torch.arange(4), "scalar": torch.tensor(2.5)}


def test_is_a_named_hash_of_160_bits():
    algorithm, digits = fingerprint(tensors()).split(":")
    assert algorithm == "b2"
    assert len(bytes.fromhex(digits)) == 20


def test_does_not_depend_on_order_strides_or_kind_of_collection():
    given = tensors()
    scattered = {**given, "a": torch.stack([given["a"], given["a"]], dim=2)[:, :, 0]}
    assert not scattered["a"].is_contiguous()
    assert fingerprint(reversed(list(scattered.items()))) == fingerprint(given)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "a": torch.nextafter(t["a"], torch.tensor(torch.inf))},
        lambda t: {**t, "a": t["a"].view(7, 5)},
        lambda t: {**t, "b": t["b"].view(torch.float64)},
        lambda t: {("c" if name == "b" else name): tensor for name, tensor in t.items()},
        lambda t: {name: tensor for name, tensor in t.items() if name != "scalar"},
        lambda t: {**t, "empty": torch.zeros(0, 3)},
    ],
    ids=["last bit", "shape", "dtype of the same bytes", "name", "one less", "one more"],
)
def test_depends_on(change: Callable):
    assert fingerprint(change(tensors())) != fingerprint(tensors())


def test_depends_on_extra_bytes():
    assert fingerprint(tensors(), extra=b"config") != fingerprint(tensors())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_reads_every_dtype(dtype: torch.dtype):
    values = torch.tensor([[0.0, 1.0], [2.0, 0.5]]).to(dtype)
    assert fingerprint({"w": values}) == fingerprint({"w": values.clone()})
    assert fingerprint({"w": values}) != fingerprint({"w": values + values if dtype.is_complex else values.float()})


def test_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch):
    given = {**tensors(), "view": torch.arange(60.0).view(3, 4, 5).permute(2, 0, 1)}
    whole = fingerprint(given)
    monkeypatch.setattr(importlib.import_module("tether.models.fingerprint"), "CHUNK", 8)
    assert fingerprint(given) == whole


def test_refuses_what_has_no_values_here_and_names_that_come_twice():
    with pytest.raises(ReferencePolicyError, match=r"'w' is on the device 'meta'.*before it is sharded"):
        fingerprint({"w": torch.zeros(2, device="meta")})
    with pytest.raises(ReferencePolicyError, match="Two tensors are named 'w'"):
        fingerprint([("w", torch.zeros(2)), ("w", torch.ones(2))])


LORA = {
    "linear layers": {"target_modules": "all-linear"},
    "embeddings and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "a module to save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "DoRA": {"target_modules": ["v_proj"], "use_dora": True},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_peft_model_without_adapters_is_the_model_it_wraps(options: dict, tied: bool):
    plain = tiny_model(tie_word_embeddings=tied)
    names, before = set(base_tensors(plain)), model_fingerprint(plain, without_adapters=True)
    wrapped = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, **options))
    assert isinstance(wrapped, PeftModel)
    wrapped.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    assert set(base_tensors(wrapped)) == names
    assert model_fingerprint(wrapped, without_adapters=True) == before
    assert model_fingerprint(wrapped, without_adapters=False) != before


def test_an_adapter_counts_with_its_values_and_its_scale():
    wrapped = get_peft_model(tiny_model(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    before = model_fingerprint(wrapped, without_adapters=False)
    base = model_fingerprint(wrapped, without_adapters=True)
    wrapped.peft_config["default"].lora_alpha = 8
    assert model_fingerprint(wrapped, without_adapters=False) != before
    wrapped.peft_config["default"].lora_alpha = 4
    trained = next(parameter for name, parameter in wrapped.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        trained[0, 0] += 1e-3
    assert model_fingerprint(wrapped, without_adapters=False) != before
    assert model_fingerprint(wrapped, without_adapters=True) == base


def test_tied_weights_count_once():
    names = set(base_tensors(tiny_model(tie_word_embeddings=True)))
    assert ("lm_head.weight" in names) != ("model.embed_tokens.weight" in names)


def test_what_does_not_change_the_policy_does_not_change_it():
    model = tiny_model()
    before = model_fingerprint(model, without_adapters=True)
    model.train()
    model.requires_grad_(False)
    model.config.use_cache = False
    model.config.pad_token_id = 7
    model.config._name_or_path = "elsewhere"
    model.set_attn_implementation("eager")
    model.generation_config.temperature = 0.3
    assert model_fingerprint(model, without_adapters=False) == before
    assert model_fingerprint(nn.DataParallel(model), without_adapters=True) == before


def test_what_changes_the_policy_changes_it():
    before = model_fingerprint(tiny_model(), without_adapters=True)
    assert model_fingerprint(tiny_model(seed=1), without_adapters=True) != before
    assert model_fingerprint(tiny_model().bfloat16(), without_adapters=True) != before
    assert model_fingerprint(tiny_model(rms_norm_eps=1e-3), without_adapters=True) != before
    one_bit = tiny_model()
    with torch.no_grad():
        weight = one_bit.get_output_embeddings().weight
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(torch.inf))
    assert model_fingerprint(one_bit, without_adapters=True) != before


def test_survives_saving_and_loading(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert model_fingerprint(again, without_adapters=True) == model_fingerprint(model, without_adapters=True)


@pytest.mark.parametrize("shard", ["10KB", "1GB"], ids=["several files", "one file"])
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("gpt2", {})])
def test_files_have_the_fingerprint_of_the_model_they_load_as(family, changes, shard, tmp_path, monkeypatch):
    """Whatever they are split into, in the dtype they are saved in and in another; nothing is loaded as a model."""
    tiny_model(family, **changes).save_pretrained(tmp_path, max_shard_size=shard)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = [model_fingerprint(model, without_adapters=True) for model in (loaded, half)]
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert checkpoint_fingerprint(tmp_path) == expected[0]
    assert checkpoint_fingerprint(tmp_path, dtype=torch.bfloat16) == expected[1]
    assert expected[0] != expected[1]


def test_files_that_differ_in_one_bit_or_one_setting_differ(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    before = checkpoint_fingerprint(tmp_path)
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    changed = checkpoint_fingerprint(tmp_path)
    assert changed != before
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert checkpoint_fingerprint(tmp_path) not in (changed, before)


def test_files_that_do_not_say_what_the_model_is_are_refused(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "less", state_dict={"lm_head.weight": model.lm_head.weight})
    with pytest.raises(ReferencePolicyError, match=r"has a tensor 'model\..*' that the files .* do not name"):
        checkpoint_fingerprint(tmp_path / "less")
    model.save_pretrained(tmp_path / "more", state_dict={**model.state_dict(), "other.weight": torch.zeros(2)})
    with pytest.raises(ReferencePolicyError, match=r"such as 'other\.weight'"):
        checkpoint_fingerprint(tmp_path / "more")
    (tmp_path / "more" / "model.safetensors").unlink()
    with pytest.raises(ReferencePolicyError, match="pickled weights are never read"):
        checkpoint_fingerprint(tmp_path / "more")
    with pytest.raises(ReferencePolicyError, match=r"has no config\.json"):
        checkpoint_fingerprint(tmp_path)
