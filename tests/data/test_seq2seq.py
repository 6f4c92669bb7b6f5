"""What an encoder and a decoder are given: prompts as the tokenizer writes a text, completions with one end token."""

from __future__ import annotations

import pytest

from data.samples import chat_tokenizer
from tether.data import prepare
from tether.data.text.seq2seq import ids_around
from tiny_seq2seq import tiny_seq2seq_tokenizer

FAMILIES = ["t5", "bart"]
ROWS = [
    {"prompt": "Who are you?", "chosen": "A model.", "rejected": "A door, I think."},
    {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"},
]


def prepared(tokenizer, rows=ROWS, **options):
    return prepare(rows, tokenizer, encoder_decoder=True, **{"max_length": None, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_what_the_tokenizer_writes_for_a_source_and_for_a_target(family):
    """INV-29, 30: nothing of ours around the texts."""
    tokenizer = tiny_seq2seq_tokenizer(family)
    for row, found in zip(ROWS, prepared(tokenizer).dataset, strict=True):
        assert found["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        expected = [tokenizer(text_target=row[part])["input_ids"] for part in ("chosen", "rejected")]
        assert found["completion_ids"] == expected
        assert found["prompt_ids"][-1] == tokenizer.eos_token_id
        for ids in found["completion_ids"]:
            assert ids.count(tokenizer.eos_token_id) == 1


def test_t5_completions_have_no_bos_and_bart_completions_have_theirs():
    assert ids_around(tiny_seq2seq_tokenizer("t5"), target=True) == ([], [1])
    bart = tiny_seq2seq_tokenizer("bart")
    assert ids_around(bart, target=True) == ([bart.bos_token_id], [bart.eos_token_id])


@pytest.mark.parametrize("family", FAMILIES)
def test_ends_that_the_text_brings_are_not_doubled(family):
    tokenizer = tiny_seq2seq_tokenizer(family)
    end = tokenizer.eos_token
    rows = [{**row, "prompt": row["prompt"] + end, "chosen": row["chosen"] + end} for row in ROWS]
    assert prepared(tokenizer, rows).dataset.to_list() == prepared(tokenizer).dataset.to_list()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_keeps_the_end_of_the_prompt_and_invents_no_end_of_a_completion(family, mode):
    """INV-30, 32: the encoder always reads its end token; a completion that is cut has none."""
    tokenizer = tiny_seq2seq_tokenizer(family)
    rows = [{"prompt": "Say it at length. " * 3, "chosen": "No." + " No." * 40, "rejected": "Yes, I say yes." * 30}]
    longest = len(tokenizer(rows[0]["prompt"])["input_ids"]) + 7
    (found,) = prepared(tokenizer, rows, max_length=longest, truncation_mode=mode).dataset
    assert found["prompt_ids"][-1] == tokenizer.eos_token_id
    for ids in found["completion_ids"]:
        assert len(found["prompt_ids"]) + len(ids) == longest
        assert ids[-1] != tokenizer.eos_token_id


def test_a_conversation_is_split_where_the_template_opens_the_answer():
    tokenizer = chat_tokenizer()
    rows = [
        {
            "prompt": [{"role": "user", "content": "Hello"}],
            "chosen": [{"role": "assistant", "content": "Hi"}],
            "rejected": [{"role": "assistant", "content": "Go"}],
        }
    ]
    (found,) = prepared(tokenizer, rows).dataset
    assert tokenizer.decode(found["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(found["completion_ids"][0]) == "Hi<|im_end|>"


def test_a_prompt_that_both_texts_share_goes_to_the_encoder():
    tokenizer = tiny_seq2seq_tokenizer("t5")
    result = prepared(tokenizer, [{"chosen": "The sky is blue.", "rejected": "The sky is green."}])
    (found,) = result.dataset
    assert found["prompt_ids"] == tokenizer("The sky is")["input_ids"]
    assert tokenizer.decode(found["completion_ids"][0], skip_special_tokens=True) == " blue."
    assert result.report.boundaries == {"shared": 1}
