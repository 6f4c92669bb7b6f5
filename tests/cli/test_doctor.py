"""`tether doctor model`: what it says of a good model, and how it ends for a bad one."""

from __future__ import annotations

import pytest
import torch

from tether.cli.main import main
from tiny import tiny_model, tiny_tokenizer
from tiny_seq2seq import tiny_seq2seq, tiny_seq2seq_tokenizer


@pytest.fixture
def folder(tmp_path):
    tiny_model(vocab_size=320).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_good_model_is_described_and_passes(folder, capsys):
    assert main(["doctor", "model", str(folder), "--lora", "2"]) == 0
    said = capsys.readouterr().out
    count = sum(p.numel() for p in tiny_model(vocab_size=320).parameters())
    # q, k, v, o, gate, up, down of 2 layers of 32, with 2 of 4 key-value heads and 64 between.
    adapter = 2 * 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
    assert f"parameters: {count:,}; trainable with LoRA of rank 2: {adapter:,}" in said
    assert "model: LlamaForCausalLM (decoder), 2 layers of 32, vocabulary 320, float32" in said
    assert "ok: head apart from the embeddings" in said
    assert "ok: chat template: ids of a prompt are a prefix" in said
    assert "scoring: tree layout" in said
    assert "problem" not in said


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


def test_a_model_that_is_not_there_ends_with_2(capsys):
    assert main(["doctor", "model", "./nowhere"]) == 2
    assert "does not exist" in capsys.readouterr().err
