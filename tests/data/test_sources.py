"""Where rows come from: every kind of source gives the same rows, and every source that cannot be read says why."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from data.samples import assistant, chat, pair, user
from tether.data import load_rows
from tether.errors import DataError

ROWS = [pair(), pair("2 + 2 =", " 4", " 5")]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows in the format that the path's ending names."""
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_format_gives_the_rows_in_order(tmp_path: Path, ending: str) -> None:
    rows = [*ROWS, pair('He said, "no"\nand left', " – ä", "\n\n")]
    assert load_rows(write(tmp_path / f"pairs{ending}", rows)).to_list() == rows


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_conversations_are_read_from_files(tmp_path: Path, ending: str) -> None:
    assert load_rows(str(write(tmp_path / f"chats{ending}", [chat(), chat()]))).to_list() == [chat(), chat()]


def test_objects_in_memory_are_taken_as_they_are() -> None:
    rows = Dataset.from_list(ROWS)
    assert load_rows(rows) is rows
    assert load_rows(ROWS).to_list() == ROWS
    assert load_rows(DatasetDict(train=rows, test=rows.select([1])), split="test").to_list() == ROWS[1:]


def test_a_glob_is_sorted_and_a_list_of_paths_keeps_its_order(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ROWS[:1]), write(tmp_path / "b.csv", ROWS[1:])
    assert load_rows(str(tmp_path / "[ab].*")).to_list() == ROWS
    assert load_rows([second, str(first)]).to_list() == ROWS[::-1]


def test_json_lines_named_json_and_blank_lines_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    assert load_rows(path).to_list() == ROWS


def test_text_that_looks_like_a_date_stays_text(tmp_path: Path) -> None:
    rows = [pair("When?", "2024-01-01T00:00:00", "2025-01-01T00:00:00")]
    assert load_rows(write(tmp_path / "dates.jsonl", rows)).to_list() == rows


def test_an_extra_column_of_mixed_types_is_kept_as_json() -> None:
    rows = load_rows([pair(score=1), pair(score="high")])
    assert rows["score"][:] == ["1", '"high"']


def test_a_hub_name_is_fetched_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, **options: str) -> Dataset:
        asked.append((name, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    assert load_rows("owner/pairs", split="test").to_list() == ROWS
    assert asked == [("owner/pairs", {"split": "test"})]


def test_a_hub_name_that_cannot_be_fetched_says_both_things_that_were_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fetch(name: str, **options: str) -> Dataset:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    with pytest.raises(
        DataError, match=r"no file `owner/pairs` .* could not be fetched: no route to the hub\. Correct"
    ):
        load_rows("owner/pairs")


def test_an_object_of_columns_is_its_rows(tmp_path: Path) -> None:
    """As pandas and others write it; a row of its own that holds conversations is still one row."""
    (tmp_path / "columns.json").write_text(json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}, indent=1))
    assert load_rows(tmp_path / "columns.json").to_list() == ROWS
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "one.json").write_text(json.dumps({"chosen": turns, "rejected": turns}, indent=1))
    assert len(load_rows(tmp_path / "one.json")) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.jsonl", "", r"`.*pairs\.jsonl` is empty"),
        ("pairs.jsonl", "\n\n", r"`.*pairs\.jsonl` has no rows"),
        ("pairs.csv", "prompt,chosen,rejected\n", r"has no rows"),
        ("pairs.json", "[]", r"has no rows"),
        ("pairs.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', r"line 3 of `.*` cannot be read as JSON"),
        ("pairs.jsonl", '{"chosen": "a", "rejected": "b", "chosen": "c"}', r"line 1 of .*`chosen` is given twice"),
        ("pairs.json", '[{"a": [{"role": "x", "role": "y"}]}]', r"as JSON \(`role` is given twice in one object"),
        ("pairs.json", '{"data": [{"a": 1}], "data": [{"a": 2}]}', r"as JSON \(`data` is given twice in one object"),
        ("pairs.jsonl", "[1, 2]\n", r"line 1 of `.*` holds a value of type list; each line must hold one object"),
        ("pairs.json", '[{"prompt": "a"}, 3]', r"row 2 of `.*` is of type int; every row must be an object"),
        ("pairs.json", '[{"prompt": "a"}', r"cannot be read as JSON"),
        ("pairs.csv", "prompt,chosen,rejected\na,b\n", r"line 2 of `.*` has 2 fields, the header has 3"),
        ("pairs.csv", "prompt,chosen,chosen\na,b,c\n", r"names a column twice"),
        ("pairs.csv", "prompt;chosen;rejected\na;b;c\n", r"separated by ';'. Separate them by commas"),
        ("pairs.csv", "prompt\tchosen\trejected\na\tb\tc\n", r"separated by '\\t'"),
        (
            "pairs.csv",
            "Export of May\nprompt,chosen,rejected\na,b,c\n",
            r"first line, `Export of May`, names one column",
        ),
        (
            "pairs.csv",
            'prompt,chosen\na, "b, c"\n',
            r"has 3 fields.*double quote opens a text only right behind a comma",
        ),
        ("pairs.csv", "prompt,chosen\na,b, c\n", r"has 3 fields, the header has 2. The first line must name the col"),
        ("pairs.parquet", "no parquet", r"cannot be read as Parquet"),
        ("pairs.txt", "a", r"ends in `\.txt`; it must end in `\.jsonl`, `\.ndjson`, `\.json`, `\.csv`, "),
        ("pairs.pkl", "a", r"ends in `\.pkl`"),  # INV-39: no pickle is loaded
        ("pairs.xlsx", "a", r"Write its rows as one of these; rename it only if its content is that already"),
        ("pairs.jsonl.zip", "a", r"ends in `\.zip`.*Unpack it; packed files are read where they are text"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("\n,,\nprompt,chosen,rejected\na,b,c\n", ["prompt", "chosen", "rejected"]),
        ("prompt,chosen,rejected,,\na,b,c,,\n", ["prompt", "chosen", "rejected", "column 4", "column 5"]),
    ],
)
def test_csv_as_spreadsheets_write_it(tmp_path: Path, content: str, columns: list[str]) -> None:
    """Blank lines before the header, and columns beside the used ones, which have no name."""
    (tmp_path / "pairs.csv").write_text(content, encoding="utf-8")
    rows = load_rows(tmp_path / "pairs.csv")
    assert rows.column_names == columns
    assert rows.to_list() == [{**dict.fromkeys(columns, ""), "prompt": "a", "chosen": "b", "rejected": "c"}]


@pytest.mark.parametrize(("ending", "codec"), [("gz", "gzip"), ("bz2", "bz2"), ("zst", "zstd"), ("lz4", "lz4")])
def test_packed_files_that_were_put_together_give_all_rows(tmp_path: Path, ending: str, codec: str) -> None:
    """`cat a.gz b.gz`, and what packers write that use several cores: several streams in one file."""
    path = tmp_path / f"pairs.jsonl.{ending}"
    with path.open("wb") as file:
        for row in ROWS:
            packed = pa.BufferOutputStream()
            with pa.CompressedOutputStream(packed, codec) as stream:
                stream.write(json.dumps(row).encode() + b"\n")
            file.write(packed.getvalue())
    assert load_rows(path).to_list() == ROWS


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="is not UTF-8"):
        load_rows(tmp_path / "pairs.jsonl")


def test_a_missing_path_says_where_it_was_looked_for_and_what_is_near(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no file `pair\.jsonl` in .*\. Did you mean `.*pairs\.jsonl`\?"):
        load_rows(tmp_path / "pair.jsonl")
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist"):
        load_rows(tmp_path / "nowhere" / "pairs.jsonl")
    with pytest.raises(DataError, match=r"no file matches `.*\*\.csv`"):
        load_rows(str(tmp_path / "*.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder `.*` has no file ending in `\.jsonl`"):
        load_rows(tmp_path / "empty")


def test_a_streamed_data_set_is_read_whole_where_a_whole_one_is_asked_for() -> None:
    rows = load_rows(IterableDataset.from_generator(lambda: iter(ROWS)))
    assert rows.to_list() == ROWS
    assert load_rows({"path": Dataset.from_list(ROWS).to_iterable_dataset()}).to_list() == ROWS


def test_other_wrong_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got a set; rows must be"):
        load_rows({1, 2})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="there are no rows"):
        load_rows([])
    with pytest.raises(DataError, match="item 2 of the list is of type int"):
        load_rows([pair(), 3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="no split `test`; there are `train`"):
        load_rows(DatasetDict(train=Dataset.from_list(ROWS)), split="test")
    with pytest.raises(DataError, match="not named after parts"):
        load_rows(write(tmp_path / "pairs.jsonl", ROWS), split="test")


def test_files_whose_columns_differ_in_type_are_refused(tmp_path: Path) -> None:
    text, messages = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", [chat()])
    with pytest.raises(DataError, match=r"give a column of one name different types"):
        load_rows([text, messages])


def test_files_may_differ_in_what_is_not_read(tmp_path: Path) -> None:
    """As one file may: exports of two days number their rows in one and name them in the other."""
    paths = [write(tmp_path / f"{value}.jsonl", [pair(id=value, meta={"a": value})]) for value in (1, "x")]
    rows = load_rows(paths)
    assert [row["prompt"] for row in rows] == ["The sky is"] * 2
    assert rows["id"][:] == ["1", '"x"']


def test_mixed_types_in_a_file_name_row_and_field_instead_of_arrows_error(tmp_path: Path) -> None:
    rows: list[dict] = [pair() for _ in range(20)]
    rows[16]["chosen"] = 42
    message = (
        r"1 of 20 rows cannot be used\. row 17: `chosen` is a number \(42\); it must be text or a list of messages"
    )
    for source in (rows, write(tmp_path / "pairs.jsonl", rows), write(tmp_path / "pairs.json", rows)):
        with pytest.raises(DataError, match=message):
            load_rows(source)


def test_a_number_inside_a_message_is_named_too() -> None:
    rows = [chat(), pair([user("Hi")], [assistant("Hello")], [{"role": "assistant", "content": 3}])]
    with pytest.raises(DataError, match=r"row 2: message 1 of `rejected` has `content` that is a number \(3\)"):
        load_rows(rows)


def test_reading_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_rows(write(tmp_path / "pairs.parquet", ROWS))
    capfd.readouterr()
    load_rows(tmp_path / "pairs.parquet")
    load_rows(write(tmp_path / "pairs.jsonl", ROWS))
    assert capfd.readouterr() == ("", "")


def test_rows_with_a_transform_are_refused():
    """It was passed over: what is trained on were the rows as they are stored."""
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match=r"have a transform.*rows\.map"):
        load_rows(rows.with_transform(lambda batch: {**batch, "chosen": ["d"]}))
    assert load_rows(rows.with_format("numpy"))["chosen"][0] == "b"
