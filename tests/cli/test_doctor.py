"""`tether doctor model`: what it says of a good model, and how it ends for a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tether.cli.main import main
from tiny import tiny_model, tiny_tokenizer
from tiny_seq2seq import tiny_seq2seq, tiny_seq2seq_tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(vocab_size=320).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_good_model_is_described_and_passes(folder, capsys):
    assert main(["doctor", "model", str(folder), "--lora", "2"]) == 0
    said = capsys.readouterr().out
    count = sum(p.numel() for p in tiny_model(vocab_size=320).parameters())
    # q, k, v, o, gate, up, down of 2 layers of 32, with 2 of 4 key-value heads and 64 between.
    adapter = 2 * 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
    assert f"parameters: {count:,}; would train: {adapter:,}" in said
    assert "adapter 'default': LORA, r 2, trains" in said
    # Half of them, the first factors, get one when the second ones are no longer zero.
    assert "ok: after a pass in evaluation mode a gradient reaches 14 of 28 trainable tensors" in said
    assert "model: LlamaForCausalLM (decoder), 2 layers of 32, vocabulary 320, float32" in said
    assert "ok: head apart from the embeddings" in said
    assert "ok: chat template: ids of a prompt are a prefix" in said
    assert "scoring: tree layout" in said
    assert "problem" not in said


def test_without_an_adapter_all_would_train(folder, capsys):
    assert main(["doctor", "model", str(folder), "--lora", "0"]) == 0
    count = sum(p.numel() for p in tiny_model(vocab_size=320).parameters())
    said = capsys.readouterr().out
    assert f"parameters: {count:,}; would train: {count:,}" in said
    assert "adapter: none" in said


def test_adapters_are_described_as_a_run_would_have_them(folder, tmp_path, capsys):
    """Continued by the model's name or by --adapter; frozen beneath a new one; and no third reading."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapter = str(tmp_path / "adapter")
    get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(adapter)
    trains = 2 * 3 * (32 + 32)
    for arguments in ([adapter], [str(folder), "--adapter", adapter]):
        assert main(["doctor", "model", *arguments]) == 0
        said = capsys.readouterr().out
        assert "adapter 'default': LORA, r 3, trains" in said
        assert f"would train: {trains:,}" in said
    assert main(["doctor", "model", str(folder), "--adapter", adapter, "--lora", "2"]) == 0
    said = capsys.readouterr().out
    assert "adapter 'frozen': LORA, r 3, frozen" in said
    assert "adapter 'default': LORA, r 2, trains" in said
    assert f"would train: {2 * 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3):,}" in said
    assert main(["doctor", "model", adapter, "--lora", "2"]) == 2
    assert "name its base and give the folder as --adapter" in capsys.readouterr().err


def test_a_gradient_that_does_not_arrive_is_a_problem(folder, capsys, monkeypatch):
    """As on a base whose layers are repacked for inference by the first pass in evaluation mode."""
    import tether.scoring

    choose = tether.scoring.choose_layout

    def repack(model, *args):
        choice = choose(model, *args)
        for name, module in model.named_modules():
            if name.endswith("lora_B.default"):
                module.register_forward_hook(lambda _, __, output: output.detach())
        return choice

    monkeypatch.setattr(tether.scoring, "choose_layout", repack)
    assert main(["doctor", "model", str(folder), "--lora", "2"]) == 1
    assert "problem: after a pass in evaluation mode a gradient reaches 0 of 28" in capsys.readouterr().out


def test_an_encoder_decoder_passes_in_its_layout(tmp_path, capsys):
    tiny_seq2seq("t5_tied", vocab_size=384).save_pretrained(tmp_path)
    tiny_seq2seq_tokenizer("t5").save_pretrained(tmp_path)
    assert main(["doctor", "model", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "(encoder-decoder)" in said
    assert "encoder_decoder layout" in said


def test_a_tokenizer_of_another_model_is_a_problem(folder, capsys):
    tiny_model(vocab_size=97).save_pretrained(folder)
    assert main(["doctor", "model", str(folder)]) == 1
    assert "problem: the tokenizer has ids up to" in capsys.readouterr().out


def test_logits_that_are_no_numbers_are_a_problem(folder, capsys):
    broken = tiny_model(vocab_size=320)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    broken.save_pretrained(folder)
    assert main(["doctor", "model", str(folder)]) == 1
    assert "problem: log-probabilities of plain text are not finite" in capsys.readouterr().out


def test_a_missing_template_is_a_note(folder, capsys):
    for file in folder.glob("*template*"):
        file.unlink()
    tiny_tokenizer(chat=False).save_pretrained(folder)
    assert main(["doctor", "model", str(folder)]) == 0
    assert "note: no chat template" in capsys.readouterr().out


def test_code_of_a_repository_runs_only_where_it_is_asked_for(folder, capsys):
    (folder / "own.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\nfrom transformers import LlamaConfig\n\n\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    )
    assert main(["doctor", "model", str(folder)]) == 2
    assert not Path("ran").exists()
    assert main(["doctor", "model", str(folder), "--trust-remote-code"]) == 2  # no class of a model has such a one
    assert Path("ran").exists()
    assert main(["doctor", "model", str(folder), "--revision", "v2"]) == 2
    assert "A revision goes with a hub name" in capsys.readouterr().err


def test_what_was_found_as_json(folder, capsys):
    assert main(["doctor", "model", str(folder), "--lora", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "adapter 'default': LORA, r 2, trains" in found["described"]
    assert {one["level"] for one in found["findings"]} == {"ok", "note"}
    assert main(["doctor", "--json"]) == 0
    assert any(one["text"].startswith("CPU: ") for one in json.loads(capsys.readouterr().out)["findings"])
    assert main(["doctor", "--json", "model", str(folder)]) == 2
    assert "tether doctor model NAME --json" in capsys.readouterr().err


def test_a_model_that_is_not_there_ends_with_2(capsys):
    assert main(["doctor", "model", "./nowhere"]) == 2
    assert "does not exist" in capsys.readouterr().err
