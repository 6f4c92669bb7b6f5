"""Loading a policy and its tokenizer: what comes back, and one paragraph for everything that cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForSequenceClassification

from tether.errors import ConfigError
from tether.models.before.blueprint import blueprint
from tether.models.fingerprint import model_fingerprint
from tether.models.load import check_source, ensure_pad_token, load_config, load_policy, load_tokenizer
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved bfloat16 model with its tokenizer."""
    path = tmp_path / "model"
    tiny_model(vocab_size=320).bfloat16().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_weights_are_float32_on_a_machine_without_accelerator(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert load_policy(folder).dtype == torch.float32
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert load_policy(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_weights_are_of_the_dtype_asked_for(folder: Path, dtype: str | torch.dtype):
    assert load_policy(str(folder), dtype=dtype).dtype == torch.bfloat16


def test_a_policy_has_the_saved_weights_and_the_attention_asked_for(folder: Path):
    model = load_policy(folder, dtype="bfloat16", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    expected = tiny_model(vocab_size=320).bfloat16()
    assert model_fingerprint(model, without_adapters=True) == model_fingerprint(expected, without_adapters=True)


def test_an_adapter_is_loaded_on_its_base_and_is_trainable(folder: Path, tmp_path: Path):
    wrapped = get_peft_model(load_policy(folder), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    model = load_policy(tmp_path / "adapter", dtype="float32")
    assert isinstance(model, PeftModel)
    assert not model.training
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert model_fingerprint(model, without_adapters=False) == model_fingerprint(wrapped, without_adapters=False)
    assert load_tokenizer(tmp_path / "adapter").chat_template == tiny_tokenizer().chat_template


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(folder: Path):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert load_tokenizer(folder, pad_token="<pad>").pad_token_id == 0


def test_a_tokenizer_with_neither_padding_nor_end_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"neither a padding nor an end token.*Set tokenizer.eos_token"):
        ensure_pad_token(tokenizer)


def refused(source: str | Path, **options: object) -> str:
    """The message of the error, which must be one paragraph."""
    with pytest.raises(ConfigError) as caught:
        load_policy(source, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_path_is_named_with_the_nearest_one(folder: Path):
    message = refused(folder.with_name("modle"))
    assert f"'{folder.with_name('modle')}' does not exist" in message
    assert f"Did you mean '{folder}'?" in message
    assert "a hub name" in message
    assert "Did you mean" not in refused("./nowhere/at/all")
    assert "missing.gguf' does not exist" in refused("missing.gguf")


def test_an_unknown_hub_name_says_that_the_hub_is_off():
    message = refused("nobody/nothing")
    assert "'nobody/nothing' is not a folder or file" in message
    assert "HF_HUB_OFFLINE is set" in message


def test_a_folder_that_is_no_model_says_what_it_holds(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    assert "has no config.json (it holds notes.txt)" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refused(tmp_path)


def test_a_single_file_leads_to_its_folder(folder: Path):
    assert f"Give the folder that holds it: '{folder}'" in refused(folder / "model.safetensors")


def test_pickles_are_never_loaded(folder: Path):
    """INV-39."""
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.zeros(1)}, folder / "pytorch_model.bin")
    message = refused(folder)
    assert "only pickles (pytorch_model.bin)" in message
    assert "save_pretrained" in message


def test_a_pickled_adapter_is_never_loaded(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "Pickled adapters (adapter_model.bin) are never loaded" in refused(tmp_path)


def test_a_classifier_is_refused_before_its_weights_are_read(tmp_path: Path):
    LlamaForSequenceClassification(tiny_model().config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert "LlamaForSequenceClassification: it has no head that predicts the next token" in refused(tmp_path)


def test_missing_and_damaged_weights_are_refused(folder: Path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 tensors that its config.json asks for (lm_head.weight)" in refused(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert "cannot be loaded" in refused(folder)


def test_options_that_cannot_be_honoured_are_refused(folder: Path):
    assert "dtype is 'float23'. Allowed: auto, float32, bfloat16, float16" in refused(folder, dtype="float23")
    assert "revision is 'v1', but the model" in refused(folder, revision="v1")
    assert "cannot be loaded" in refused(folder, attn_implementation="no_such_attention")


def test_a_folder_without_tokenizer_is_refused(folder: Path):
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"The tokenizer in .* cannot be loaded"):
        load_tokenizer(folder)


def test_a_source_is_checked_without_loading(folder: Path):
    check_source(folder)
    check_source("some/hub-name")
    check_source("gpt2")
    with pytest.raises(ConfigError, match="does not exist"):
        check_source("../gpt2")


def test_kernels_that_a_configuration_names_are_not_fetched(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for own in ({"attn_implementation": "kernels-community/x"}, {"text_config": {"_attn_implementation": "a/b"}}):
        (folder / "config.json").write_text(json.dumps({**config, **own}))
        with pytest.raises(ConfigError, match=r"names kernels of a repository .*code that would be fetched and run"):
            load_policy(folder)
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}))
    assert load_policy(folder).config.num_hidden_layers == config["num_hidden_layers"]


@pytest.mark.parametrize(
    "own",
    [
        {"num_attention_heads": 0},
        {"hidden_size": -64},
        {"hidden_size": "64"},
        {"model_type": ["llama"]},
        {"rope_parameters": {"rope_type": "__class__"}},
        {"dtype": "__import__('os')"},
        {"pad_token_id": 10**9},
        {"architectures": [{"a": 1}]},
        {"num_hidden_layers": 10**9},
        {"n": 1, "nested": {"num_experts": 10**9}},
    ],
    ids=str,
)
def test_a_configuration_of_values_that_make_no_model_is_named(folder: Path, own: dict[str, Any]) -> None:
    """Whatever the code of a model makes of them: errors of numbers, types and names, or building without end."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    said = r"cannot be loaded: |describes none that can be built: |allowed is at most"
    with pytest.raises(ConfigError, match=said):
        (blueprint(load_config(folder)), load_policy(folder))


def test_files_beside_a_model_that_hold_something_else_are_named(folder: Path) -> None:
    for name, read in (("generation_config.json", load_policy), ("tokenizer_config.json", load_tokenizer)):
        kept = (folder / name).read_text()
        (folder / name).write_text("[1]")
        with pytest.raises(ConfigError, match="cannot be loaded: "):
            read(folder)
        (folder / name).write_text(kept)


def test_tensors_of_other_shapes_and_pointers_of_git_lfs_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 2 * config["hidden_size"]}))
    with pytest.raises(ConfigError, match=r"tensors in its files have other shapes than its config\.json says"):
        load_policy(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ConfigError, match=r"model\.safetensors' is a pointer of Git LFS .* `git lfs pull`"):
        load_policy(folder)
