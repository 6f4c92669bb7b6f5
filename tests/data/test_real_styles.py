"""INV-29 to 31 on four styles of tokenizer and on the templates that real models have, written down here."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from data.samples import TEXTS, assistant, pair, user
from support.styles import ENDS, QWEN3, STYLES, bpe
from tether.data import prepare
from tether.errors import DataError


@pytest.fixture(scope="module", params=STYLES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return STYLES[request.param]()


CHATS = [
    pair([user("Who are you?")], [assistant("I am a small model.")], [assistant("I am the sea.")]),
    pair([user("Hi"), assistant("Hello there"), user("2 + 2 =")], [assistant("4")], [assistant("2, and 4")]),
]


def run(rows: list[dict], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[Any]:
    prepared = prepare(rows, tokenizer, **{"max_length": None, **options})
    assert prepared.report.kept == len(rows)
    return list(prepared.dataset)


def counted(ids: list[int], tokenizer: PreTrainedTokenizerBase, token: str | None) -> int:
    return ids.count(tokenizer.convert_tokens_to_ids(token)) if token else 0  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ENDS)
def test_conversations_have_one_bos_and_each_completion_one_end(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    template, end = ENDS[name]
    tokenizer.chat_template = template
    end = end or str(tokenizer.eos_token)
    for row in run(CHATS, tokenizer):
        for completion in row["completion_ids"]:
            whole = row["prompt_ids"] + completion
            assert completion[-1] == tokenizer.convert_tokens_to_ids(end)
            assert counted(completion, tokenizer, end) == 1
            assert counted(whole, tokenizer, tokenizer.bos_token) == ("bos_token" in template)


@pytest.mark.parametrize("name", ENDS)
def test_the_prompt_and_the_completion_make_up_the_whole_conversation(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """INV-29, INV-31: their ids are those of the conversation rendered and tokenised at once, up to its last end."""
    tokenizer.chat_template = ENDS[name][0]
    for source, row in zip(CHATS, run(CHATS, tokenizer), strict=True):
        whole = tokenizer.apply_chat_template(source["prompt"] + source["chosen"], tokenize=False)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        made = row["prompt_ids"] + row["completion_ids"][0]
        assert made == ids[: len(made)]  # type: ignore[index]
        after = tokenizer.decode(ids[len(made) :])  # type: ignore[index]
        assert str(after).strip() == ""


@pytest.mark.parametrize("name", ENDS)
def test_turns_of_the_assistant_are_masked_in_every_style(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = ENDS[name][0]
    talk = [user("Who are you?"), assistant("a model"), user("the sky?"), assistant("the sea")]
    [row] = run([{"messages": talk}], tokenizer, kind="completion", turns="assistant")
    ids, mask = row["completion_ids"][0], row["scored"][0]
    said = str(tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if on], skip_special_tokens=True))
    quiet = str(tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if not on]))
    squeezed = "".join(said.split()).replace("<think></think>", "")
    assert squeezed in ("amodelthesea", "<think></think>amodelthesea")
    assert "thesky" in "".join(quiet.split())
    assert "thesea" not in "".join(quiet.split())


def test_text_in_every_style(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        pair(),
        pair(TEXTS[0], " " + TEXTS[1], " No."),
        {"chosen": "The sky is blue.", "rejected": "The sky is red."},
    ]
    for row in run(rows[:2], tokenizer) + run(rows[2:], tokenizer):
        for completion in row["completion_ids"]:
            assert completion[-1] == tokenizer.eos_token_id
            assert completion.count(tokenizer.eos_token_id) == 1
            assert tokenizer.eos_token_id not in row["prompt_ids"]
            assert (row["prompt_ids"] + completion).count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("name", ENDS)
def test_inv_31_with_and_without_a_prompt_column(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = ENDS[name][0]
    whole = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in CHATS]
    explicit, implicit = run(CHATS, tokenizer), run(whole, tokenizer)
    assert [dict(row) for row in explicit] == [dict(row) for row in implicit]


@pytest.mark.parametrize("name", ENDS)
def test_inv_31_text_with_the_templates_own_markers_is_reported(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    template, end = ENDS[name]
    tokenizer.chat_template = template
    marker = end or str(tokenizer.eos_token)
    row = pair([user(f"What does {marker} mean?")], [assistant("An end.")], [assistant("A sea.")])
    report = prepare([*CHATS, row], tokenizer, max_length=None).report
    assert report.marker_rows == 1
    assert report.markers == {marker: 1}


@pytest.mark.parametrize("mode", ["keep_start", "keep_end", "middle"])
@pytest.mark.parametrize("name", ENDS)
@pytest.mark.sweep(8)
def test_inv_32_truncation_keeps_beginnings_and_makes_no_end(
    name: str, mode: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """At every limit below the whole length: a completion is a beginning of the whole one, with its end only where
    nothing was cut, the same beside another sibling; at least one token is left, or the row is dropped and counted."""
    tokenizer.chat_template = ENDS[name][0]
    [whole] = run(CHATS[:1], tokenizer)
    prompt, completions = whole["prompt_ids"], whole["completion_ids"]
    longest = len(prompt) + max(map(len, completions))
    beside = {**CHATS[0], "rejected": [assistant("2 + 2 = 4, and it is the sea that is green")]}
    for limit in range(2, longest, 3):
        try:
            prepared = prepare([CHATS[0]], tokenizer, max_length=limit, truncation_mode=mode)
        except DataError as error:
            message = str(error)
            assert (mode == "keep_start" and limit <= len(prompt)) or "equal to rejected within max_length" in message
            continue
        [row] = prepared.dataset
        for own, full in zip(row["completion_ids"], completions, strict=True):
            assert own == full[: len(own)]
            assert 1 <= len(own) <= limit
            assert own[-1] != full[-1] or len(own) == len(full) or full[-1] in full[:-1]
        if mode == "keep_start":
            assert row["prompt_ids"] == prompt
        assert len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) <= limit
        if mode == "keep_start":
            [other] = prepare([beside], tokenizer, max_length=limit, truncation_mode=mode).dataset
            assert other["completion_ids"][0] == row["completion_ids"][0]


def test_thinking_can_be_switched_per_row() -> None:
    tokenizer = bpe()
    tokenizer.chat_template = QWEN3
    rows = [CHATS[0] | {"chat_template_kwargs": {"enable_thinking": on}} for on in (True, False)]
    on, off = run(rows, tokenizer, kind="prompt_only")
    assert str(tokenizer.decode(off["prompt_ids"])).endswith("assistant\n<think>\n\n</think>\n\n")
    assert str(tokenizer.decode(on["prompt_ids"])).endswith("assistant\n")
