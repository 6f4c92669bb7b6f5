"""GGUF files: converted once, into a folder that is whole or not there, and the same policy afterwards."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tether.errors import ConfigError
from tether.models import gguf as module
from tether.models.gguf import cache_root, check_gguf, convert_gguf, converted_folder
from tether.models.load import load_policy, load_tokenizer
from tiny import tiny_model, tiny_tokenizer

HEADS, KEY_VALUE_HEADS = 4, 2
# GGUF wants blocks of 32 numbers, so heads of 8 and a hidden size of 32 are the smallest that a real file could have.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: the two halves of a rotary pair side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    """Write a Llama as llama.cpp's own converter does, unquantised, with its tokenizer."""
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    state = tokenizer.backend_tokenizer.model.__getstate__()
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in json.loads(state)["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__))
    writer.add_token_types([3 if index < 4 else 1 for index in range(len(tokenizer))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            values = interleaved(values, HEADS if "q_proj" in name else KEY_VALUE_HEADS)
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{NAMES[rest]}.weight", values)
        else:
            writer.add_tensor(f"{NAMES[stem]}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def bfloat16_model() -> PreTrainedModel:
    """A float32 Llama whose weights bfloat16 holds exactly, as the cache does."""
    vocabulary = len(tiny_tokenizer())
    return tiny_model(vocab_size=vocabulary, hidden_size=32, num_attention_heads=HEADS).bfloat16().float()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A tiny GGUF file."""
    write_gguf(tmp_path / "tiny.gguf", bfloat16_model())
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_is_the_policy_that_was_written(file: Path, cache: Path):
    model = load_policy(file, dtype="float32")
    tokenizer = load_tokenizer(file)
    ids = tokenizer("the film was good", return_tensors="pt").input_ids
    assert ids.tolist() == [tiny_tokenizer()("the film was good").input_ids]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, bfloat16_model()(ids).logits)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    model(ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    (folder,) = (cache / "gguf").iterdir()
    assert folder == converted_folder(file)


def test_it_is_converted_once_whatever_its_name(file: Path, monkeypatch: pytest.MonkeyPatch):
    folder = convert_gguf(file)
    renamed = file.rename(file.with_name("other.gguf"))
    monkeypatch.setattr(module, "_write", lambda *_: pytest.fail("converted again"))
    assert convert_gguf(renamed) == folder
    renamed.write_bytes(renamed.read_bytes() + b"\0")
    assert converted_folder(renamed) != folder


def test_a_killed_conversion_leaves_nothing_that_looks_finished(file: Path, monkeypatch: pytest.MonkeyPatch):
    write = module._write

    def killed(path: Path, folder: Path) -> None:
        write(path, folder)
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(file)
    assert not converted_folder(file).exists()
    monkeypatch.setattr(module, "_write", write)
    assert (convert_gguf(file) / "model.safetensors").is_file()


def test_leftovers_of_killed_conversions_are_removed_but_not_those_at_work(file: Path):
    folder = converted_folder(file)
    old, young = (folder.with_name(f".{folder.name}.{name}") for name in ("old", "young"))
    old.mkdir(parents=True)
    young.mkdir()
    past = time.time() - 2 * module.STALE_AFTER
    os.utime(old, (past, past))
    convert_gguf(file)
    assert not old.exists()
    assert young.exists()


def test_the_second_of_two_conversions_at_once_takes_the_first(file: Path, monkeypatch: pytest.MonkeyPatch):
    write = module._write

    def slow(path: Path, folder: Path) -> None:
        write(path, folder)
        first = converted_folder(path)
        first.mkdir()
        (first / "of the first").touch()

    monkeypatch.setattr(module, "_write", slow)
    folder = convert_gguf(file)
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    assert (folder / "of the first").exists()


def test_what_is_no_gguf_file_is_refused(tmp_path: Path):
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match=r"begins with b'vers' where a GGUF file has b'GGUF'.*download it again"):
        load_policy(tmp_path / "pointer.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ConfigError, match=r"cut\.gguf"):
        load_policy(tmp_path / "cut.gguf")


def test_a_missing_reader_is_named(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install tether\[gguf\]"):
        check_gguf(file)


def test_a_cache_that_cannot_be_written_is_named(file: Path, cache: Path):
    cache.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match="TETHER_CACHE"):
        convert_gguf(file)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("TETHER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "tether"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "tether"
