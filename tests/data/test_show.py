"""`tether data show`: every token has the role of the message that it is from."""

from __future__ import annotations

from typing import Any

import pytest

from data.samples import PLAIN, assistant, chat_tokenizer, pair, user
from support.styles import ENDS, STYLES
from tether.data import load_rows
from tether.data.show import shown_row
from tiny_vision import picture, tiny_processor

TALK = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello there"), user("2 + 2 =")]


def said(tokens: list[Any]) -> list[tuple[str, str]]:
    """Runs of tokens of one role, as role and text."""
    runs: list[tuple[str, str]] = []
    for token in tokens:
        if runs and runs[-1][0] == token.role:
            runs[-1] = token.role, runs[-1][1] + token.text
        else:
            runs.append((token.role, token.text))
    return runs


def show(row: dict, tokenizer: Any, **options: Any) -> list[Any]:
    [shown], _ = shown_row(load_rows([row]), 1, tokenizer, **options)
    return shown


@pytest.mark.parametrize("template", [None, PLAIN], ids=["chatml", "plain"])
def test_each_message_has_its_role(template: str | None) -> None:
    tokenizer = chat_tokenizer(*([template] if template else []))
    prompt, chosen, _ = show(pair(TALK, [assistant("4")], [assistant("5")]), tokenizer)
    runs = said(prompt)
    assert [role for role, _ in runs] == ["system", "user", "assistant", "user", "assistant"]
    for (_, text), message in zip(runs, TALK, strict=False):
        assert message["content"] in text
    assert said(chosen)[0][0] == "assistant"
    assert not any(token.scored for token in prompt)


@pytest.mark.parametrize("style", ["byte-level BPE", "SentencePiece BPE", "bytes"])
@pytest.mark.parametrize("name", ENDS)
def test_roles_in_every_style_and_template(style: str, name: str) -> None:
    """A system message is left out, as Gemma's template refuses one."""
    tokenizer = STYLES[style]()
    tokenizer.chat_template = ENDS[name][0]
    prompt, chosen, rejected = show(pair(TALK[1:], [assistant("four")], [assistant("five")]), tokenizer)
    runs = said(prompt)
    assert {role for role, _ in runs} == {"user", "assistant"}
    # What opens the answer has a role of its own where the template writes something.
    assert [role for role, _ in runs][:3] == ["user", "assistant", "user"]
    assert "Hello" in "".join(text for role, text in runs if role == "assistant")
    assert "Hello" not in "".join(text for role, text in runs if role == "user")
    assert {token.role for token in (*chosen, *rejected)} == {"assistant"}


def test_completions_of_several_turns() -> None:
    row = pair([user("Hi")], [assistant("A"), user("More"), assistant("B")], [assistant("C")])
    _, chosen, rejected = show(row, chat_tokenizer(), turns="last")
    assert [role for role, _ in said(chosen)] == ["assistant", "user", "assistant"]
    assert "More" in said(chosen)[1][1]
    assert "".join(token.text for token in chosen if token.scored).startswith("B")
    assert {token.role for token in rejected} == {"assistant"}


def test_roles_are_cut_as_the_tokens_are() -> None:
    row = pair(TALK, [assistant("four and more")], [assistant("five")])
    tokenizer = chat_tokenizer()
    whole = show(row, tokenizer)
    for mode in ("keep_end", "middle"):
        prompt, chosen, _ = show(row, tokenizer, max_length=30, truncation_mode=mode)
        assert len(prompt) < len(whole[0])
        expected = whole[0][-len(prompt) :] if mode == "keep_end" else None
        assert expected is None or [token.role for token in prompt] == [token.role for token in expected]
        assert prompt[-1].role == "assistant"
        assert {token.role for token in chosen} == {"assistant"}


def test_text_has_no_roles_and_labelled_pairs_show_both() -> None:
    tokenizer = chat_tokenizer()
    assert {token.role for part in show(pair(), tokenizer) for token in part} == {""}
    rows = load_rows([pair([user("Hi")], [assistant("A")], [assistant("B")])])
    shown, report = shown_row(rows, 1, tokenizer, kind="unpaired", max_length=40)
    assert [{token.role for token in part[1]} for part in shown] == [{"assistant"}] * 2
    assert report.kept == 2


def test_images_are_shown_by_their_tokens() -> None:
    content = [{"type": "text", "text": "look "}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": " so"}]
    row = {
        "images": [picture(0), picture(1)],
        "prompt": [{"role": "user", "content": content}],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
    }
    prompt, *_ = show(row, tiny_processor("llava"))
    runs = said(prompt)
    assert [role for role, _ in runs] == ["user", "assistant"]
    assert runs[0][1].count("<image>") == 32
    assert " so" in runs[0][1]
