"""What a run remarks on its rows: many dropped, a length that tells pairs apart; silence where there is neither."""

from __future__ import annotations

import logging

import pytest

from cli.conftest import character_tokenizer
from tether import DPOConfig
from tether.training.setup.data import RunData


@pytest.fixture
def remarks(tmp_path, caplog):
    def prepared(rows):
        args = DPOConfig(output_dir=str(tmp_path), max_length=24, dataset_cache=None, use_cpu=True, report_to="none")
        with caplog.at_level(logging.WARNING, logger="tether"):
            RunData(character_tokenizer(eos_token="</s>", pad_token="<pad>"), args).prepare("train", rows)
        return caplog.messages

    return prepared


def _pairs(count, chosen, rejected):
    return [{"prompt": f"{n:02}", "chosen": chosen(n), "rejected": rejected(n)} for n in range(count)]


def test_lengths_that_tell_pairs_apart(remarks):
    (said,) = remarks(_pairs(40, lambda n: f" longer {n:02}", lambda n: f" no {n:02}"))
    assert "in 100% of 40 sampled pairs of unequal lengths the longer completion is the chosen one" in said


def test_a_large_part_that_is_dropped(remarks):
    rows = _pairs(30, lambda n: " ab"[: 2 + n % 2], lambda n: " cd"[: 3 - n % 2])
    long = [{"prompt": "p" * 40, "chosen": f" a{n}", "rejected": f" b{n}"} for n in range(20)]
    (said,) = remarks(rows + long)
    assert "40% of the rows are not trained on, most with a prompt that fills max_length" in said
    assert "raise max_length (now 24)" in said


def test_nothing_is_said_of_rows_that_are_well(remarks):
    assert remarks(_pairs(40, lambda n: " ab"[: 2 + n % 2], lambda n: " cd"[: 3 - n % 2])) == []


@pytest.mark.parametrize(("template", "said"), [("{{ messages }}", 1), (None, 0)])
def test_text_beside_a_chat_template_is_trained_on_as_it_is_and_that_is_said(template, said, tmp_path, caplog):
    """No template writes the prompt of a chat model then, and it is glued to its answer."""
    caplog.set_level(logging.INFO, logger="tether")
    tokenizer = character_tokenizer(eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    data = RunData(tokenizer, DPOConfig(output_dir=str(tmp_path), report_to=[], dataset_cache=None, use_cpu=True))
    for name in ("train", "eval"):
        data.prepare(name, [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}])
    assert sum("the rows are text and are trained on as they are" in line for line in caplog.messages) == said
