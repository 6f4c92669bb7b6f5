"""The ids of well-formed rows are TRL 1.16's; where INV-30 forces another choice, the difference is stated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from data.samples import CHATML, HEADERS, TEXTS, THINKING, assistant, chat, chat_tokenizer, pair, user
from tether.data import prepare

pytest.importorskip("trl")

STANDARD = [
    pair(),
    pair(TEXTS[0], " " + TEXTS[1], "\nNo."),
    pair("2 + 2 =", " 4", " 5, and 4 - 2 = 3"),
    pair("Hello there,", " who", " who are you?"),
]
CHATS = [
    chat(),
    chat("", "The sky", "the sea"),
    pair([user("Hi"), assistant("Hello"), user("Who?")], [assistant("A model")], [assistant("A <b>sea</b>\n")]),
    pair([{"role": "system", "content": "Be kind."}, user("Hi")], [assistant("A")], [assistant("B")]),
    pair([user("Hi")], [assistant("A"), user("And?"), assistant("B")], [assistant("C")]),
]


def implicit(rows: list[dict]) -> list[dict]:
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]


def by_trl(rows: list[dict], tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[tuple]:
    """What TRL's DPO trainer makes of rows, without building a trainer, and its collator's truncation."""
    from accelerate import PartialState
    from trl.trainer.dpo_trainer import DPOTrainer

    PartialState()  # TRL's logger needs it
    args = SimpleNamespace(**{"dataset_num_proc": None, "max_length": None, "truncation_mode": "keep_start", **options})
    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer),  # type: ignore[arg-type]
        Dataset.from_list(rows),
        tokenizer,
        args,  # type: ignore[arg-type]
        "train",
    )
    rows = []
    for row in prepared:
        room = None if args.max_length is None else args.max_length - len(row["prompt_ids"])
        rows.append((row["prompt_ids"], [row["chosen_ids"][:room], row["rejected_ids"][:room]]))
    return rows


def by_tether(rows: list[dict], tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[tuple]:
    prepared = prepare(rows, tokenizer, **{"max_length": None, **options})
    assert prepared.report.kept + prepared.report.dropped["prompt_too_long"] == len(rows)
    return [(row["prompt_ids"], row["completion_ids"]) for row in prepared.dataset]


@pytest.mark.parametrize("kind", ["byte_tokenizer", "space_tokenizer"])
@pytest.mark.parametrize("form", [list, implicit])
def test_text(form: Any, kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    rows = form(STANDARD)
    assert by_tether(rows, tokenizer) == by_trl(rows, tokenizer)


@pytest.mark.parametrize("max_length", [5, 8, 12, 60])
def test_text_truncated_at_its_end(max_length: int, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(prompt, " blue is the sea" * 3, " green" * 5) for prompt in ("Hi", "The sky is", TEXTS[0])]
    assert by_tether(rows, byte_tokenizer, max_length=max_length) == by_trl(rows, byte_tokenizer, max_length=max_length)


@pytest.mark.parametrize("form", [list, implicit])
def test_conversations_whose_turns_end_in_a_token(form: Any) -> None:
    tokenizer, rows = chat_tokenizer(HEADERS), form(CHATS)
    assert by_tether(rows, tokenizer) == by_trl(rows, tokenizer)


@pytest.mark.parametrize("form", [list, implicit])
@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_chatml_is_the_same_but_for_the_newline_after_the_last_turn(form: Any, template: str) -> None:
    tokenizer, rows = chat_tokenizer(template), form(CHATS)
    [newline] = tokenizer("\n")["input_ids"]
    theirs = by_trl(rows, tokenizer)
    assert all(completion[-1] == newline for _, completions in theirs for completion in completions)
    assert by_tether(rows, tokenizer) == [(p, [completion[:-1] for completion in cs]) for p, cs in theirs]
