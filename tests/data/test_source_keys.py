"""What a source says of its rows besides their format: roles, keys, columns; and what a run does to rows."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from data.samples import CHATML, chat, chat_tokenizer
from tether.data import load_rows
from tether.data.prepare.prepare import prepare
from tether.data.sources.stream import RowStream
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


def test_two_fields_of_one_column_are_refused_and_not_one_of_them_lost() -> None:
    row = {"a": "Why?", "b": "So.", "c": "No."}
    fields = {"prompt": "a", "chosen": "b", "rejected": "b"}
    with pytest.raises(ConfigError, match="both `chosen` and `rejected` are in the column `b`"):
        load_rows({"path": [row], "fields": fields})
    rows = load_rows({"path": [row], "fields": {**fields, "rejected": "c"}})
    assert rows.to_list() == [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}]


@pytest.mark.parametrize(
    ("role", "advice"), [("function", "roles: {function: tool}"), ("tool_call", "as `tool_calls`")]
)
def test_roles_of_calls_are_refused_unless_the_template_names_them(role: str, advice: str) -> None:
    """OpenAI's older name of a tool, and ms-swift's calls as text, which a template of any role would write."""
    said = [{"role": "user", "content": "q"}, {"role": role, "content": "{}"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match=f"row 1: a message has the role `{role}`.*{advice}"):
        prepare([{"messages": said}], chat_tokenizer(), kind="completion", max_length=None)
    naming = CHATML + f"{{% if messages[0]['role'] == '{role}' %}}{{% endif %}}"
    assert prepare([{"messages": said}], chat_tokenizer(naming), kind="completion", max_length=None).report.kept == 1


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
    with pytest.raises(ConfigError, match="the rows are text, which has no messages"):
        prepare(load_rows([{"prompt": "x", "chosen": "a", "rejected": "b"}]), tokenizer, max_length=None, system="Hi")


NUMBERED = [{"text": str(n)} for n in range(7)]


@pytest.mark.parametrize(
    "split", ["train[:3]", "train[2:5]", "train[-2:]", "train[:-3]", "train[10%:50%]", "train[:7%]+test"]
)
def test_parts_and_bounds_are_those_of_datasets(split: str, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NUMBERED))
    theirs = datasets.load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "cache"))
    mine = load_rows({"path": str(folder), "split": split}, kind="completion")
    assert mine["text"] == theirs["text"]
    streamed = RowStream({"path": str(folder), "split": split}, kind="completion")
    if "%" in split or "-" in split:
        with pytest.raises(ConfigError, match="needs the number of rows, which a stream does not know"):
            list(streamed.chunks())
    else:
        assert [text for chunk in streamed.chunks() for text in chunk["text"]] == theirs["text"]


def test_a_split_that_cannot_be_read_is_an_error() -> None:
    for split in ("train[a:]", "train[:5", "train]", ""):
        with pytest.raises(ConfigError, match="expected a part, such as train, with or without bounds"):
            load_rows({"path": NUMBERED, "split": split}, kind="completion")
    with pytest.raises(DataError, match="and no row lies within its bounds"):
        load_rows({"path": NUMBERED, "split": "train[:5%]"}, kind="completion")
    assert load_rows({"path": NUMBERED, "split": "train[:50%]"}, kind="completion")["text"] == ["0", "1", "2", "3"]


def test_a_function_of_ones_own_makes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.py").write_text(
        "def doubled(row):\n    return {'text': row['text'] * 2}\n\n"
        "def makes(cfg, *args):\n"
        "    assert cfg.rl is None\n"
        "    return (lambda row, tokenizer=None: {'text': 'n' + row['number']}), {'remove_columns': ['number']}\n\n"
        "def wrong(row):\n    return 1\n"
    )
    rows = load_rows({"path": NUMBERED, "transform": "rows.py:doubled", "split": "train[:2]"}, kind="completion")
    assert rows["text"] == ["00", "11"]
    numbers = [{"number": row["text"], "kept": 1} for row in NUMBERED]
    rows = load_rows({"path": numbers, "transform": "rows.py:makes", "first": 1}, kind="completion")
    assert rows.to_list() == [{"kept": 1, "text": "n0"}]
    streamed = RowStream({"path": numbers, "transform": "rows.py:makes"}, kind="completion")
    assert next(streamed.chunks())["text"] == [f"n{n}" for n in range(7)]
    for place, said in (
        ("rows.py:none", "has no function 'none'; it has doubled, makes, wrong"),
        ("other.py:x", "A transform of rows is 'other.py:x', and there is no file other.py"),
        ("no_such_module:x", "or an installed module"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_rows({"path": NUMBERED, "transform": place}, kind="completion")
    with pytest.raises(DataError, match="made a int of a row"):
        load_rows({"path": NUMBERED, "transform": "rows.py:wrong"}, kind="completion")
