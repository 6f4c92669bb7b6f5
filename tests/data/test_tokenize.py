"""Rendering and tokenising: exact boundaries, one BOS, one end of turn, whatever tokenizer and template come."""

from __future__ import annotations

import time

import pytest
from transformers import PreTrainedTokenizerFast

from data.samples import (
    CHATML,
    HEADERS,
    PLAIN,
    REFUSING,
    TEXTS,
    THINKING,
    assistant,
    byte_level,
    chat,
    chat_tokenizer,
    metaspace,
    pair,
    user,
)
from tether.data import Encoder, Tokenized, chat_template, load_rows, preferences, read_preferences, render, tokenize
from tether.data.text import template_sandbox
from tether.errors import DataError


def run(tokenizer: PreTrainedTokenizerFast, *rows: dict, boundary: str = "split") -> list[Tokenized]:
    """Rows all the way to ids."""
    data = load_rows(list(rows))
    schema = read_preferences(data)
    template = chat_template(tokenizer) if schema.form == "conversational" else None
    given = schema.form == "conversational" or not schema.shared_prompt
    rendered = render(preferences(data, schema), tokenizer, template=template, given_boundary=given)
    return tokenize(rendered, Encoder(tokenizer, template=template), boundary=boundary)  # type: ignore[arg-type]


def text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


# -- the prompt boundary (INV-29) --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_tokenizer", "space_tokenizer"])
def test_inv_29_prompt_ids_are_a_prefix_of_the_whole(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    rows = [pair(), pair(TEXTS[0], " " + TEXTS[1], " No.")]
    for row, ids in zip(rows, run(tokenizer, *rows), strict=True):
        assert ids.boundary == "exact"
        for name, completion in zip(("chosen", "rejected"), ids.completion_ids, strict=True):
            whole = tokenizer(row["prompt"] + row[name])["input_ids"]
            assert ids.prompt_ids + completion == [*whole, tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", ["byte_tokenizer", "space_tokenizer"])
def test_inv_29_an_inexact_boundary_splits_by_default_and_loses_no_text(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """ "The sky is " + "blue": the space belongs to the next token, so ids(prompt) is no prefix."""
    tokenizer = request.getfixturevalue(kind)
    [ids] = run(tokenizer, pair("The sky is ", "blue", "green"))
    assert ids.boundary == "split"
    assert ids.prompt_ids == tokenizer("The sky is ")["input_ids"]
    chosen = tokenizer.decode(ids.prompt_ids + ids.completion_ids[0], skip_special_tokens=True)
    assert chosen == "The sky is blue"


def test_inv_29_only_the_completion_concerned_is_split(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    [ids] = run(byte_tokenizer, pair("The sky is ", "blue", "\n"))
    assert ids.boundary == "split"
    alone = run(byte_tokenizer, pair("The sky is ", "\n", "?"))[0].completion_ids[0]
    assert ids.completion_ids[1] == alone


def test_inv_29_an_inexact_boundary_can_drop_the_row_or_stop(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(), pair("The sky is ", "blue", "green")]
    assert [ids.dropped for ids in run(byte_tokenizer, *rows, boundary="drop")] == [None, "boundary"]
    with pytest.raises(
        DataError, match=r"row 2: the tokens of the prompt are not a prefix .* from ' ' on: tokens merge"
    ):
        run(byte_tokenizer, *rows, boundary="error")


def test_a_template_that_renders_the_prompt_otherwise_alone_ends_it_where_they_part() -> None:
    tokenizer = chat_tokenizer(THINKING)
    [ids] = run(tokenizer, chat())
    assert ids.boundary == "template"
    assert text(tokenizer, ids.prompt_ids).endswith("<|im_start|>assistant\n")
    assert text(tokenizer, ids.completion_ids[0]) == "I am a model.<|im_end|>"
    with pytest.raises(DataError, match="the template writes the prompt alone differently"):
        run(tokenizer, chat(), boundary="error")


# -- BOS and end of turn (INV-30) --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Hello", "<s>Hello", "<s><s>Hello"])
def test_inv_30_at_most_one_bos(prompt: str, space_tokenizer: PreTrainedTokenizerFast) -> None:
    [ids] = run(space_tokenizer, pair(prompt))
    assert ids.prompt_ids[0] == space_tokenizer.bos_token_id
    assert (ids.prompt_ids + ids.completion_ids[0]).count(space_tokenizer.bos_token_id) == 1


def test_inv_30_a_template_that_writes_bos_gets_no_second_one() -> None:
    tokenizer = metaspace()
    tokenizer.chat_template = "{{ bos_token }}" + PLAIN
    [ids] = run(tokenizer, chat())
    assert (ids.prompt_ids + ids.completion_ids[0]).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("ending", ["", "<eos>", "<eos><eos>"])
def test_inv_30_text_ends_in_exactly_one_eos(ending: str, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    eos = byte_tokenizer.eos_token_id
    [ids] = run(byte_tokenizer, pair(chosen=" blue." + ending))
    assert ids.completion_ids[0][-1] == eos
    assert ids.completion_ids[0].count(eos) == 1
    assert ids.ends_added == 0


def test_inv_30_a_tokenizer_that_adds_eos_itself_ends_neither_the_prompt_nor_a_completion_twice() -> None:
    tokenizer = metaspace(adds_eos=True)
    [ids], [plain] = run(tokenizer, pair()), run(metaspace(), pair())
    assert (ids.prompt_ids, ids.completion_ids) == (plain.prompt_ids, plain.completion_ids)


@pytest.mark.parametrize("template", [CHATML, HEADERS])
@pytest.mark.parametrize("ending", ["", "<|im_end|>"])
def test_inv_30_a_conversation_ends_in_exactly_one_end_of_turn(template: str, ending: str) -> None:
    """What ChatML writes after `<|im_end|>`, a newline, is not part of a completion."""
    tokenizer = chat_tokenizer(template)
    [ids] = run(tokenizer, chat(good="I am a model." + ending))
    assert text(tokenizer, ids.completion_ids[0]) == "I am a model.<|im_end|>"
    assert ids.ends_added == 0


def test_inv_30_every_turn_inside_a_completion_keeps_its_end() -> None:
    tokenizer = chat_tokenizer()
    longer = [assistant("A"), user("And?"), assistant("B")]
    [ids] = run(tokenizer, pair([user("Hi")], longer, [assistant("C")]))
    assert text(tokenizer, ids.completion_ids[0]) == (
        "A<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nB<|im_end|>"
    )


def test_the_end_of_turn_of_the_template_wins_over_the_eos_token() -> None:
    """Instruction models whose tokenizer still names the base model's eos are common."""
    tokenizer = chat_tokenizer(eos_token="<|endoftext|>")
    [ids] = run(tokenizer, chat())
    assert text(tokenizer, ids.completion_ids[0]).endswith("model.<|im_end|>")


def test_a_template_without_an_end_of_turn_gets_eos_and_says_so() -> None:
    tokenizer = chat_tokenizer(PLAIN, eos_token="<eos>")
    [ids] = run(tokenizer, chat())
    assert text(tokenizer, ids.completion_ids[0]) == "I am a model.\n<eos>"
    assert ids.ends_added == 2


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(DataError, match=r"no end-of-sequence token, so .* Set tokenizer\.eos_token"):
        run(byte_level(), pair())


# -- forms of one row (INV-31) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [pair(), pair(TEXTS[0], " blue", " green"), pair("Why?", "\nA", "\tB")])
@pytest.mark.parametrize("kind", ["byte_tokenizer", "space_tokenizer"])
def test_inv_31_text_with_and_without_a_prompt_column(row: dict, kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    whole = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
    [given], [shared] = run(tokenizer, row), run(tokenizer, whole)
    assert (given.prompt_ids, given.completion_ids) == (shared.prompt_ids, shared.completion_ids)
    assert (given.boundary, shared.boundary) == ("exact", "shared")


def test_inv_31_conversations_with_and_without_a_prompt_column(chatml: PreTrainedTokenizerFast) -> None:
    row = pair([user("Hi"), assistant("Hello"), user("Who?")], [assistant("A sea")], [assistant("A sky")])
    whole = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
    assert run(chatml, row) == run(chatml, whole)


def test_a_shared_prompt_that_ends_inside_a_word_moves_to_the_start_of_its_tokens(
    space_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """ "…blue" and "…black" share the letters "bl"; no model would see them as a prompt."""
    [ids] = run(space_tokenizer, {"chosen": "The sky is green.", "rejected": "The sky is greener."})
    whole = space_tokenizer("The sky is green.")["input_ids"]
    assert ids.prompt_ids + ids.completion_ids[0] == [*whole, space_tokenizer.eos_token_id]


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_an_empty_prompt_is_bos_or_drops_the_row(
    byte_tokenizer: PreTrainedTokenizerFast, space_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert run(byte_tokenizer, pair(""))[0].dropped == "empty_prompt"
    assert run(space_tokenizer, pair(""))[0].prompt_ids == [space_tokenizer.bos_token_id]
    gpt2 = byte_level(bos_token="<eos>", eos_token="<eos>")
    [ids] = run(gpt2, pair("", "blue"))
    assert (ids.prompt_ids, text(gpt2, ids.completion_ids[0])) == ([gpt2.bos_token_id], "blue<eos>")


def test_a_prompt_that_ends_in_an_assistant_message_is_continued(chatml: PreTrainedTokenizerFast) -> None:
    [ids] = run(chatml, pair([user("Hi"), assistant("I am")], [assistant(" a model.")], [assistant(" the sea.")]))
    assert text(chatml, ids.prompt_ids).endswith("<|im_start|>assistant\nI am")
    assert text(chatml, ids.completion_ids[0]) == " a model.<|im_end|>"
    assert ids.boundary == "exact"


def test_completions_that_part_in_a_user_message_get_no_generation_prompt(chatml: PreTrainedTokenizerFast) -> None:
    history = [user("Hi"), assistant("Hello")]
    row = {
        "chosen": [*history, user("Who?"), assistant("A")],
        "rejected": [*history, user("What?"), assistant("A")],
    }
    [ids] = run(chatml, row)
    assert text(chatml, ids.prompt_ids).endswith("Hello<|im_end|>\n")
    assert text(chatml, ids.completion_ids[0]) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nA<|im_end|>"
    )


def test_each_distinct_text_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(eos_token="<eos>")
    data = load_rows([pair(), pair(chosen=" grey."), pair(chosen=" red.")])
    rendered = render(preferences(data, read_preferences(data)), tokenizer)
    encoder, seen = Encoder(tokenizer), []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda texts: seen.extend(texts) or encode(texts))
    tokenize(rendered, encoder)
    assert sorted(seen) == sorted({"The sky is", *(f"The sky is {word}." for word in ("blue", "green", "grey", "red"))})


# -- templates ---------------------------------------------------------------------------------------------------------


def test_conversations_need_a_chat_template() -> None:
    message = r"the rows are conversations, but the tokenizer has no chat template .* Name one .*chat_template_path"
    with pytest.raises(DataError, match=message):
        run(chat_tokenizer(None), chat())


def test_a_template_of_a_processor_is_used_when_its_tokenizer_has_none() -> None:
    class Processor:
        tokenizer = chat_tokenizer(None)
        chat_template = CHATML

    assert chat_template(Processor()) == CHATML  # type: ignore[arg-type]


def test_a_template_that_refuses_a_conversation_names_the_row() -> None:
    rows = [chat(), pair([{"role": "system", "content": "Be kind."}, user("Hi")], [assistant("A")], [assistant("B")])]
    with pytest.raises(
        DataError, match=r"row 2: the chat template refuses .*no system role.*; its roles are system, user"
    ):
        run(chat_tokenizer(REFUSING), *rows)


def test_a_template_that_writes_a_prompt_differently_each_time_is_refused() -> None:
    """Its prompts begin none of its texts, as those of `THINKING` do not, which is taken."""
    with pytest.raises(DataError, match=r"row 1: the chat template wrote the prompt twice in two ways"):
        run(chat_tokenizer("{{ strftime_now('%S.%f') }}" + CHATML), chat())
    assert run(chat_tokenizer(THINKING), chat())[0].boundary == "template"


ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for m in messages %}{% endfor %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("template", [ENDLESS, "{% if messages|length > 2 %}" + ENDLESS + "{% endif %}{{ messages }}"])
def test_a_template_that_does_not_end_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that ends for the conversations it is first tried with."""
    monkeypatch.setattr(template_sandbox, "ENDS_WITHIN", 0.3)
    tokenizer = byte_level(eos_token="<eos>")
    tokenizer.chat_template = template
    row = pair([user("Hi"), assistant("Hm"), user("So?")], [assistant("yes")], [assistant("no")])
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"The chat template did not end within 0\.3 s"):
        run(tokenizer, row, row)
    assert time.monotonic() - begun < 20


def test_what_ends_in_time_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "ENDS_WITHIN", 0.2)
    with template_sandbox.ending_template():
        pass
    begun = time.monotonic()
    while time.monotonic() - begun < 0.4:
        pass
