"""Formats of other tools by their names: what each makes of a row, how faults are named, how sources are mixed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from data.samples import pair
from support.format_examples import ASKED, BAD, EXAMPLES, GOOD, HH, said
from tether.data import load_rows, preferences, read_preferences
from tether.data.rows.conversion import detected
from tether.data.rows.formats import FORMATS
from tether.data.sources.stream import RowStream
from tether.data.split import split_rows
from tether.errors import ConfigError, DataError

TOOL_TALK = [
    said("human", "Hi"),
    said("function_call", '{"name": "f", "arguments": {"x": 1}}'),
    said("observation", "2"),
]
IDS = [f"{name}-{kind}-{place}" for place, (name, kind, *_) in enumerate(EXAMPLES)]


@pytest.mark.parametrize(("name", "kind", "row", "expected"), EXAMPLES, ids=IDS)
def test_what_a_format_makes_of_a_row(name: str, kind: str, row: dict, expected: dict) -> None:
    rows = load_rows({"path": [row], "format": name}, kind=kind)  # type: ignore[arg-type]
    assert {column: rows[0][column] for column in expected} == expected
    schema = read_preferences(rows, kind=kind)  # type: ignore[arg-type]
    [record] = preferences(rows, schema)
    assert record.prompt == expected["prompt"]


def test_every_format_has_an_example() -> None:
    families = {name.replace("llama3.", "chatml.").replace("mistral.", "chatml.") for name in FORMATS}
    shown = {name.replace("llama3.", "chatml.").replace("mistral.", "chatml.") for name, *_ in EXAMPLES}
    assert families <= shown


def test_function_calls_and_observations_become_tool_calls_and_tool_messages() -> None:
    row = {
        "conversations": TOOL_TALK,
        "chosen": said("gpt", "So."),
        "rejected": said("gpt", "No."),
        "tools": '[{"name": "f"}]',
    }
    rows = load_rows([row])
    [record] = preferences(rows, read_preferences(rows))
    assert isinstance(record.prompt, list)
    assert record.prompt[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert record.prompt[2] == {"role": "tool", "content": "2"}
    assert record.tools == [{"name": "f"}]


def test_any_format_gives_its_prompts_alone() -> None:
    rows = load_rows({"path": [{"question": "Why?", "chosen": 3}], "format": "chatml.intel"}, kind="prompt_only")
    assert rows[0]["prompt"] == ASKED


def test_an_answer_of_several_steps_is_kept_whole_beside_its_prompt() -> None:
    """It may repeat the end of its prompt; what comes then is the answer, and not its last message alone."""
    steps = [{**GOOD[0], "content": "Let me see."}, {"role": "tool", "content": "22"}, *GOOD]
    row = {"system": "Be kind.", "prompt": "Why? ", "chosen": [*ASKED, *steps], "rejected": steps[1:]}
    found = load_rows({"path": [{**row, "rejected": steps}], "format": "chatml.ultra"})[0]
    assert [found[name] for name in ("chosen", "rejected")] == [steps, steps]
    assert [message["content"] for message in found["prompt"]] == ["Be kind.", "Why? "]
    with pytest.raises(DataError, match="`rejected` begins with messages of the tool"):
        load_rows({"path": [row], "format": "chatml.ultra"})


def test_patterns_put_text_together() -> None:
    origin = {
        "path": [{"system": "Be kind.", "prompt": "Why?", "chosen": "So.", "rejected": "No."}],
        "format": "user_defined",
        "prompt_format": "{system}\nQ: {prompt}\nA:",
        "chosen_format": " {chosen}",
        "rejected_format": " {rejected}",
    }
    assert load_rows(origin)[0] == pair("Be kind.\nQ: Why?\nA:", " So.", " No.")


# -- detection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "kind", "name"),
    [
        (["conversations", "chosen", "rejected"], "pair", "sharegpt"),
        (["conversations"], "completion", "sharegpt"),
        (["messages", "rejected"], "pair", "messages_rejected"),
        (["question", "chosen", "rejected"], "pair", None),
        (["instruction", "input", "chosen", "rejected"], "pair", None),
        (["prompt", "chosen", "rejected"], "pair", None),
        (["conversations", "prompt", "chosen", "rejected"], "pair", None),
    ],
)
def test_only_what_can_be_no_other_is_recognised(columns: list[str], kind: Any, name: str | None) -> None:
    found = detected(columns, kind)
    assert (found and found.name) == name


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "fault"),
    [
        ("chatml.intel", {"chosen": "a", "rejected": "b"}, "`question` is missing; there are chosen, rejected"),
        (
            "chatml.intel",
            {"question": 3, "chosen": "a", "rejected": "b"},
            r"`question` is a number \(3\); it must be text",
        ),
        (
            "chatml.ultra",
            {"prompt": "a", "chosen": [], "rejected": "b"},
            "`chosen` is a list; it must be text, a message",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "me", "value": "a"}]},
            "message 1 of `conversations` has a role that is text",
        ),
        ("sharegpt", {"conversations": "a"}, "`conversations` is text .'a'.; it must be a list of at least 1 messages"),
        (
            "alpaca",
            {"instruction": "a", "history": [["b"]]},
            "turn 1 of `history` is a list; it must be a question and",
        ),
        ("hh", {"chosen": "Hello", "rejected": "b"}, "`chosen` begins with 'Hello'; a transcript begins with 'Human:'"),
        ("hh", {"chosen": HH + "a", "rejected": "\n\nHuman: x\n\nAssistant: y"}, "there is no one prompt"),
        (
            "zephyr.nectar",
            {"prompt": "a", "answers": [{"rank": 1}, {}]},
            "item 1 of `answers` is an object with the keys rank",
        ),
        (
            "zephyr.nectar",
            {"prompt": "a", "answers": [{"rank": 1, "answer": "b"}, {"rank": 1.0, "answer": "c"}]},
            "two answers have the best rank, 1, so that neither is preferred",
        ),
        (
            "chatml.argilla_chat",
            {"chosen": [*ASKED, *GOOD], "rejected": [{**ASKED[0], "content": "How?"}, *BAD]},
            "`rejected` begins with messages of the user that the prompt of this row does not end in",
        ),
        (
            "chatml.ultra",
            {"prompt": "Why?", "chosen": [{"role": "system", "content": "Be kind."}, *ASKED, *GOOD], "rejected": "b"},
            "`chosen` begins with messages of the system that the prompt",
        ),
    ],
)
def test_a_fault_names_row_field_and_format(name: str, row: dict, fault: str) -> None:
    good = next(row for form, kind, row, _ in EXAMPLES if form == name and kind == "pair")
    with pytest.raises(DataError, match=rf"\(format {name}\): 1 of 2 rows cannot be used\. row 2: .*{fault}"):
        load_rows({"path": [good, row], "format": name}, name="train")


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ({"format": "chatml.inte"}, "there is no format `chatml.inte`. Did you mean `chatml.intel`?"),
        ({"formt": "hh"}, "a source has the key `formt`, which is not known. Did you mean `format`?"),
        ({"weight": 0}, "weight is 0; it must be a number above 0"),
        ({"fraction": 0}, "fraction is 0; it must be a number above 0"),
        ({"fraction": 0.5, "weight": 2}, "weight says how often a row occurs and fraction which share"),
        ({"first": 0}, "first is 0; it must be a whole number from 1"),
        ({"first": True}, "first is True; it must be a whole number from 1"),
        ({"fields": ["a"]}, "fields is .* it must be a mapping such as {prompt: question}"),
        ({"prompt_format": "{prompt}"}, "prompt_format is given with the format `None`, which does not read it"),
        ({"format": "user_defined", "prompt_format": "{prompt"}, "prompt_format is '{prompt', which cannot be read"),
        ({"format": "user_defined", "prompt_format": "{prompt.__class__}"}, "a place must be the name of a field"),
    ],
)
def test_wrong_words_about_a_source_are_refused(origin: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_rows({"path": [pair(label=True, completion="a")], **origin}, kind="unpaired")


def test_a_kind_that_a_format_has_no_answers_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="`hh` cannot be read as `ranked`; they can be read as `pair`, `prompt_only`"):
        load_rows({"path": [pair()], "format": "hh"}, kind="ranked")


@pytest.mark.parametrize("name", ["sharegpt", "hh", "chatml.intel", "messages_rejected", "zephyr.nectar"])
def test_pairs_of_any_format_are_labelled_completions_too(name: str) -> None:
    """As those with TRL's columns are; a row that has a label is still read by it."""
    row = next(row for own, kind, row, _ in EXAMPLES if own == name and kind == "pair")
    origin = {"path": [row], "format": name}
    assert load_rows(origin, kind="unpaired").to_list() == load_rows(origin).to_list()
    assert read_preferences(load_rows(origin, kind="unpaired"), kind="unpaired").kind == "pair"


def test_a_row_without_a_label_is_not_taken_for_a_pair() -> None:
    with pytest.raises(DataError, match=r"row 1: `label` is missing; it must be true or false"):
        load_rows({"path": [{"question": "Why?", "completion": "So."}], "format": "chatml.intel"}, kind="unpaired")


# -- sources -----------------------------------------------------------------------------------------------------------


def test_fields_give_columns_their_names() -> None:
    row = {"q": "Why?", "good": " So.", "rejected": " No.", "prompt": "another thing"}
    for rows in ([row], Dataset.from_list([row])):
        found = load_rows({"path": rows, "fields": {"prompt": "q", "chosen": "good"}})
        assert dict(found[0]) == pair("Why?", " So.", " No.")
    with pytest.raises(DataError, match=r"fields say that `prompt` is in the column `goood`, .*Did you mean `good`"):
        load_rows({"path": [row], "fields": {"prompt": "goood"}})


def test_several_sources_are_joined_with_their_weights() -> None:
    first, second = [pair(f"a{n}") for n in range(1000)], [pair(f"b{n}") for n in range(3)]
    rows = load_rows([{"path": first, "weight": 0.3}, {"path": second, "weight": 2}])
    drawn = [prompt for prompt in rows["prompt"] if prompt[0] == "a"]
    assert 290 <= len(drawn) <= 310
    assert len(set(drawn)) == len(drawn)
    assert rows["prompt"][-6:] == ["b0", "b0", "b1", "b1", "b2", "b2"]
    again = load_rows([{"path": first, "weight": 0.3}, {"path": second, "weight": 2}])
    assert again["prompt"][:] == rows["prompt"][:]


def test_fractions_are_shares_of_all_rows_as_trl_takes_them() -> None:
    sources = {"a": 1000, "b": 30, "c": 7}
    given = [
        {"path": [pair(f"{name}{n}") for n in range(count)], "fraction": fraction}
        for (name, count), fraction in zip(sources.items(), (0.6, 0.3, 0.1), strict=True)
    ]
    rows = load_rows(given)["prompt"][:]
    # At most 70 rows have a tenth in 7 of them; the first rows of each.
    assert rows == [f"{name}{n}" for name, count in (("a", 42), ("b", 21), ("c", 7)) for n in range(count)]
    scaled = [{**one, "fraction": one["fraction"] * 50} for one in given]
    assert load_rows(scaled)["prompt"][:] == rows
    # With repeats every row is taken, and the others begin again: 1000 rows have six tenths of 1667.
    again = load_rows([{**one, "repeat": True} for one in given])["prompt"][:]
    assert [sum(prompt.startswith(name) for prompt in again) for name in sources] == [1000, 500, 167]
    assert again[1000:1033] == [*(f"b{n}" for n in range(30)), "b0", "b1", "b2"]
    with pytest.raises(ConfigError, match="repeat is given for some sources and not for all"):
        load_rows([{**given[0], "repeat": True}, *given[1:]])
    with pytest.raises(ConfigError, match="repeat is given without fraction"):
        load_rows([{"path": [pair()], "repeat": True}])
    with pytest.raises(ConfigError, match=r"fraction is given for some sources and not for source 2\. Give all"):
        load_rows([given[0], {"path": [pair()]}])
    with pytest.raises(ConfigError, match="fraction needs the number of rows of every source, which a stream"):
        next(RowStream(given).chunks())


@pytest.mark.parametrize("ending", [".jsonl.gz", ".arrow", ".parquet", ".jsonl.zst"])
def test_compressed_and_arrow_files(tmp_path: Path, ending: str) -> None:
    path, lines = tmp_path / f"rows{ending}", "\n".join(map(json.dumps, [pair(), pair("Why?")])).encode()
    table = pa.Table.from_pylist([pair(), pair("Why?")])
    if ending == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif ending == ".jsonl.zst":
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(lines)
    elif ending == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    assert load_rows(path)["prompt"][:] == load_rows(tmp_path)["prompt"][:] == ["The sky is", "Why?"]


def test_a_torn_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(pair()).encode() * 99)[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz` cannot be unpacked"):
        load_rows(path)


def test_a_saved_data_set_is_read_from_its_folder(tmp_path: Path) -> None:
    Dataset.from_list([pair()]).save_to_disk(str(tmp_path / "saved"))
    assert load_rows(tmp_path / "saved")["prompt"][:] == ["The sky is"]


# -- splits ------------------------------------------------------------------------------------------------------------


def test_a_split_by_prompt_puts_no_prompt_on_both_sides_and_does_not_move() -> None:
    rows = load_rows([pair(f"{n // 3}?", f" {n}") for n in range(900)])
    train, held = split_rows(rows, {"split": 0.1})
    assert not set(train["prompt"]) & set(held["prompt"])
    assert 50 <= len(held) <= 140
    more = load_rows([*reversed([pair(f"{n // 3}?", f" {n}") for n in range(1200)])])
    again = set(split_rows(more, {"split": 0.1})[1]["prompt"])
    assert set(held["prompt"]) == {prompt for prompt in again if int(prompt[:-1]) < 300}


def test_a_split_by_rows_and_by_number() -> None:
    rows = load_rows([pair("Why?", f" {n}") for n in range(100)])
    train, held = split_rows(rows, {"split": 20, "by": "row"})
    assert (len(train), len(held)) == (80, 20)
    with pytest.raises(DataError, match="leaves one side empty"):
        split_rows(rows, {"split": 20})
    for asked, message in (({"split": 1.0}, "eval.split is 1.0"), ({"split": 2, "by": "x"}, "eval.by is 'x'")):
        with pytest.raises(ConfigError, match=message):
            split_rows(rows, asked)
