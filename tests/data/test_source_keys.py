"""What a source says of its rows besides their format: roles, keys, columns; and what a run does to rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.samples import CHATML, chat, chat_tokenizer
from tether.data import load_rows
from tether.data.prepare.prepare import prepare
from tether.errors import ConfigError, DataError
from tether.training.setup.data import distinct_rows
from tiny import tiny_tokenizer

TALK = [{"who": "bard", "text": "q"}, {"who": "gpt", "text": "a"}]
ROW = {"talk": TALK, "extra": 1}


def test_roles_and_keys_of_messages_have_the_usual_names() -> None:
    source = {"path": [ROW], "fields": {"messages": "talk"}, "roles": {"bard": "user", "gpt": "assistant"}}
    rows = load_rows({**source, "message_keys": {"role": "who", "content": "text"}, "columns": ["talk"]}, kind="text")
    assert rows.to_list() == [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    with pytest.raises(ConfigError, match="message_keys has 'speaker'"):
        load_rows({**source, "message_keys": {"speaker": "who"}})
    with pytest.raises(DataError, match="columns has `none`; there are `extra`, `talk`"):
        load_rows({"path": [ROW], "columns": ["none"]})


@pytest.mark.parametrize("role", ["human", "gpt", "User", "Assistant"])
def test_a_role_under_another_name_is_refused_unless_the_template_names_it(role: str) -> None:
    """The template would write it as it is, and of an answer's role a part would be the answer."""
    usual = {"human": "user", "gpt": "assistant"}.get(role, role.lower())
    row = chat()
    row = {
        key: [{**message, "role": role if message["role"] == usual else message["role"]} for message in value]
        for key, value in row.items()
    }
    with pytest.raises(DataError, match=rf"row 1: a message has the role `{role}`.*`roles: {{{role}: {usual}}}`"):
        prepare([row], chat_tokenizer(), max_length=None)
    said = prepare(
        load_rows({"path": [row], "roles": {role: usual}}), chat_tokenizer(), max_length=None
    ).dataset.to_list()
    assert said == prepare([chat()], chat_tokenizer(), max_length=None).dataset.to_list()
    opened = role if usual == "assistant" else "assistant"
    named = chat_tokenizer(f"{{# '{role}' #}}" + CHATML.replace("start|>assistant", f"start|>{opened}"))
    [found] = prepare([row], named, max_length=None).dataset
    assert named.decode(found["completion_ids"][0]) == "I am a model.<|im_end|>"


def test_a_tool_call_without_the_object_around_it_is_written_as_any_other() -> None:
    """Templates read `tool_call.function`; many files have the name and the arguments alone."""
    called = (
        "{% for call in message.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments.x }}{% endfor %}"
    )
    tokenizer = chat_tokenizer(CHATML.replace("message['content'] +", "message['content'] }}" + called + "{{"))
    call = {"name": "f", "arguments": {"x": "here"}}
    found = []
    for given in (call, {"id": "1", **call}, {"type": "function", "function": call}):
        row = chat() | {"chosen": [{"role": "assistant", "content": "", "tool_calls": [given]}]}
        found.append(prepare([row], tokenizer, max_length=None).dataset.to_list())
    assert found[0] == found[1] == found[2]
    assert tokenizer.decode(found[0][0]["completion_ids"][0]) == "f here<|im_end|>"


def test_rows_that_occur_again_are_left_out() -> None:
    rows = load_rows([{"prompt": p, "chosen": "a", "rejected": "b"} for p in "xyxx"])
    assert distinct_rows(rows, "train")["prompt"] == ["x", "y"]


def test_a_row_that_is_too_long_is_an_error_when_that_is_asked() -> None:
    rows = [{"prompt": "x", "chosen": "a", "rejected": "b"}, {"prompt": "x " * 40, "chosen": "a", "rejected": "b"}]
    with pytest.raises(DataError, match=r"row 2 has \d+ tokens, and max_length is 16"):
        prepare(load_rows(rows), tiny_tokenizer(), max_length=16, truncation_mode="error")
    assert len(prepare(load_rows(rows[:1]), tiny_tokenizer(), max_length=16, truncation_mode="error").dataset) == 1


def test_a_default_system_message_stands_before_conversations_without_one(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ' ' }}{% endfor %}"
    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "u"), ("assistant", "a"), ("assistant", "b"))
    )
    own = [{"role": "system", "content": "own"}, user]
    rows = load_rows([{"prompt": prompt, "chosen": [good], "rejected": [bad]} for prompt in ([user], own)])
    found = prepare(rows, tokenizer, max_length=None, system="Hi")
    said = [tokenizer.decode(ids) for ids in found.dataset["prompt_ids"]]
    plain = prepare(rows, tokenizer, max_length=None).dataset["prompt_ids"]
    assert tokenizer.decode(plain[1]) == said[1]
    assert len(found.dataset["prompt_ids"][0]) > len(plain[0])
