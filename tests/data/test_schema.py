"""INV-33: one check of all rows, with row numbers, before any weights load; nothing is dropped silently."""

from __future__ import annotations

import pytest
from datasets import Dataset

from data.samples import assistant, chat, pair, user
from tether.data import Schema, load_rows, preferences, read_preferences
from tether.data.rows.shared import split_prompt
from tether.errors import DataError


def check(rows: list[dict]) -> Schema:
    return read_preferences(load_rows(rows), name="train")


def test_text_and_conversations_are_told_apart() -> None:
    columns = ("prompt", "chosen", "rejected")
    assert check([pair()]) == Schema("standard", shared_prompt=False, rows=1, columns=columns)
    assert check([chat(), chat()]) == Schema("conversational", shared_prompt=False, rows=2, columns=columns)


def test_without_a_prompt_column_the_common_beginning_is_the_prompt() -> None:
    rows = load_rows([{"chosen": "The sky is blue.", "rejected": "The sky is green."}])
    schema = read_preferences(rows)
    assert schema == Schema("standard", shared_prompt=True, rows=1, columns=("chosen", "rejected"))
    [record] = preferences(rows, schema)
    assert (record.prompt, record.completions) == ("The sky is", (" blue.", " green."))


def test_common_leading_messages_are_the_prompt() -> None:
    history = [user("Hi"), assistant("Hello"), user("Who are you?")]
    rows = load_rows([{"chosen": [*history, assistant("A")], "rejected": [*history, assistant("B")]}])
    [record] = preferences(rows, read_preferences(rows))
    assert (record.prompt, record.completions) == (history, ([assistant("A")], [assistant("B")]))


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("a b", "a c", ("a", " b", " c")),
        ("ab", "ac", ("a", "b", "c")),
        ("ab", "abc", ("a", "b", "bc")),  # no completion is left empty
        ("x", "y", ("", "x", "y")),
        ("same", "same", ("sam", "e", "e")),
    ],
)
def test_where_a_shared_prompt_ends(chosen: str, rejected: str, expected: tuple[str, str, str]) -> None:
    assert split_prompt(chosen, rejected) == expected


def test_a_text_prompt_beside_whole_conversations_is_recognised_and_reported() -> None:
    whole = {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant("B")]}
    schema = check([{"prompt": "Hi", **whole}])
    assert (schema.shared_prompt, schema.unused_columns) == (True, ("prompt",))
    for other in ("Another", None):
        assert check([{"prompt": other, **whole}]).unused_columns == ("prompt",)


def test_source_rows_count_from_0_and_parts_can_be_read() -> None:
    rows = load_rows([pair(f"{n}:") for n in range(5)])
    assert [(r.source_row, r.prompt) for r in preferences(rows, read_preferences(rows), 2, 4)] == [(2, "2:"), (3, "3:")]


def test_columns_and_message_fields_that_are_not_read_are_listed() -> None:
    named = {**assistant("A"), "name": "Ann"}
    schema = check([pair([user("Hi")], [named], [assistant("B")], score=3, origin="web")])
    assert schema.unused_columns == ("score", "origin")
    assert schema.message_fields == ("name",)


def test_a_missing_column_lists_what_was_found() -> None:
    with pytest.raises(DataError) as caught:
        check([{"prompt": "a", "choosen": "b", "rejected": "c"}])
    assert str(caught.value) == (
        "train: the column `chosen` is missing. Columns found: prompt, choosen, rejected. A preference row has "
        "`chosen` and `rejected`, and `prompt` unless both begin with it; rename the columns, or name them where "
        "the rows are: `{path: FILE, fields: {chosen: COLUMN}}`."
    )
    with pytest.raises(DataError, match=r"the columns `chosen` and `rejected` are missing\. Columns found: text"):
        check([{"text": "a"}])


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        (
            {"prompt": "a", "Chosen": "b", " Rejected": "c"},
            "(`Chosen` to `chosen`, spelt as it is here, ` Rejected` to `rejected`, spelt as it is here)",
        ),
        ({"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"}, "as it is with `format: alpaca`"),
    ],
)
def test_what_to_do_is_said_where_it_is_known(row: dict, advice: str) -> None:
    with pytest.raises(DataError) as caught:
        check([row])
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        pair(margin=float("inf")),
        pair(weight=-1.0),
        pair(*(f'[{{"role": "user", "content": "{text}"}}]' for text in "abc")),
        pair([user("Hi")], [assistant("A")], [user("B")]),
        pair([user("Hi")], [assistant("A")], [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]),
        pair([user("Hi")], [assistant("A")], [assistant([{"type": "output_text", "text": "B"}])]),
    ],
)
def test_no_format_is_named_that_would_read_the_same_fault(row: dict) -> None:
    with pytest.raises(DataError) as caught:
        check([row])
    assert "Correct or remove them" in str(caught.value)
    assert "format:" not in str(caught.value)


def test_a_prompt_under_another_name_is_not_guessed_from_shared_text() -> None:
    row = {"question": "Why?", "chosen": "The sky.", "rejected": "The sea."}
    with pytest.raises(DataError, match="there is no `prompt`, but a column `question`; rename it"):
        check([row])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (pair(chosen=None), "`chosen` is missing (null); it must be text or a list of messages"),
        (pair([user("Hi")], [], [assistant("B")]), "`chosen` is an empty list; it must hold at least one message"),
        (
            pair(chosen="[{'role': 'user', 'content': 'Hi'}]"),
            "`chosen` is text that spells out a list of messages; store the list itself, in JSON or Parquet",
        ),
        (
            pair([user("Hi")], [{"from": "gpt", "value": "A"}], [{"from": "gpt", "value": "B"}]),
            "message 1 of `chosen` has the keys from, value, as ShareGPT's rows do; it must have `role` and `content`",
        ),
        (
            pair([user("Hi")], [assistant("A")], [user("B")]),
            "the last message of `rejected` is from the user; it must be an answer",
        ),
        (
            pair([user("Hi")], [user("Hi"), assistant("A")], [user("Hi"), assistant("B")]),
            "`chosen` repeats the messages of `prompt`; leave them out of one of the two",
        ),
        (
            {"chosen": "blue", "rejected": "green"},
            "do not begin alike, so no prompt can be told; add a `prompt` column",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row: dict, fault: str) -> None:
    with pytest.raises(DataError) as caught:
        check([row])
    assert f"row 1: {fault}" in str(caught.value) or fault in str(caught.value)


def test_a_wrong_type_in_row_17_is_found_in_a_typed_data_set() -> None:
    values = [" blue."] * 16 + [None] + [" blue."] * 3
    rows = Dataset.from_dict({"prompt": ["a"] * 20, "chosen": values, "rejected": ["b"] * 20})
    with pytest.raises(DataError, match=r"1 of 20 rows cannot be used\. row 17: `chosen` is missing \(null\)"):
        read_preferences(rows)
    numbers = Dataset.from_dict({"prompt": ["a"], "chosen": [42], "rejected": ["b"]})
    with pytest.raises(DataError, match=r"row 1: `chosen` is a number \(42\); it must be text or a list of messages"):
        read_preferences(numbers)


def test_rows_that_mix_text_and_messages_are_refused() -> None:
    with pytest.raises(DataError, match=r"row 2: .* `chosen` is a list of messages; it must be text, like the rest"):
        check([pair(), chat()])
    with pytest.raises(DataError, match=r"row 1: `prompt` is a list of messages; it must be text"):
        check([pair(prompt=[user("Hi")])])


def test_five_faults_are_shown_and_all_are_counted() -> None:
    with pytest.raises(DataError) as caught:
        check([pair(chosen=None, rejected=None) for _ in range(4)] + [pair()])
    message = str(caught.value)
    assert message.startswith("train: 4 of 5 rows cannot be used (8 faults, the first 5 shown).")
    assert message.count("missing (null)") == 5
    assert "\n" not in message


@pytest.mark.parametrize("column", ["images", "image"])
def test_columns_that_change_what_a_model_sees_are_refused_and_not_ignored(column: str) -> None:
    with pytest.raises(DataError, match=f"row 2: the column `{column}` holds values, and Tether does not read it yet"):
        check([chat() | {column: None}, chat() | {column: ["something"]}])
    assert check([chat() | {column: None}]).unused_columns == (column,)


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (
            {**assistant("A"), "tool_calls": [{"function": {"name": None, "arguments": {}}}]},
            "has a tool call without a `name`",
        ),
        (
            assistant([{"type": "thinking", "thinking": "A"}]),
            r"has `content` in parts that are not all text \(one is `thinking`\), which",
        ),
        ({**assistant("A"), "function_call": {"name": "f"}}, "has `function_call`, the older form of a tool call"),
        ({**assistant("A"), "tool_calls": "f()"}, "has `tool_calls` that is text"),
        ({"role": "assistant", "content": [{"type": "image"}]}, "has `content` in parts"),
    ],
)
def test_message_fields_that_are_not_supported_are_refused(message: dict, fault: str) -> None:
    with pytest.raises(DataError, match=f"row 1: message 1 of `chosen` {fault}"):
        check([pair([user("Hi")], [message], [message])])
