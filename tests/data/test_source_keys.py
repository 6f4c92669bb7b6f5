"""What a source says of its rows besides their format: roles, keys, columns; and what a run does to rows."""

from __future__ import annotations

from pathlib import Path

import pytest

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
