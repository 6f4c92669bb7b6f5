"""Large files take memory in proportion to what is needed at a time, and packed ones cannot fill it."""

from __future__ import annotations

import gzip
import json
import random
import tempfile

import pytest

from data.samples import byte_level
from tether.compat.datasets import arrow_table
from tether.data import prepare, spool
from tether.data.prepare.cache import prepare_cached
from tether.data.rows import values
from tether.data.sources import files, load, tables
from tether.data.sources.load import load_rows
from tether.data.text.marks import lost_texts
from tether.errors import DataError

ROWS = [{"prompt": f"row {n}:", "chosen": " yes", "rejected": " no", "n": n if n % 2 else None} for n in range(50)]


def written(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_large_file_in_pieces_is_the_small_one_read_whole(tmp_path, monkeypatch):
    path = written(tmp_path / "rows.jsonl", ROWS)
    whole = load_rows(path)
    monkeypatch.setattr(load, "_LARGE", 1)
    monkeypatch.setattr(load, "_PIECE", 7)
    read = []
    monkeypatch.setattr(load, "read_file", lambda *given: read.append(given))
    pieces = load_rows(path)
    assert read == []
    assert pieces.to_list() == whole.to_list()
    assert pieces.features == whole.features


@pytest.mark.parametrize("size", [2**24, 1])
def test_a_column_of_several_types_is_itself_under_another_name_however_large_the_file(tmp_path, monkeypatch, size):
    """As JSON, in which columns are kept that nothing reads, every answer would have been learnt in quotes."""
    monkeypatch.setattr(load, "_LARGE", size)
    monkeypatch.setattr(load, "_PIECE", 4)
    rows = [{"ask": "Why?", "said": 5 if n % 4 == 1 else f"So {n}", "no": "No", "id": n or "x"} for n in range(8)]
    path = written(tmp_path / "rows.jsonl", rows)
    names = {"prompt": "ask", "chosen": "said", "rejected": "no"}
    for source in ({"path": path}, {"path": path, "split": "train[:50%]+train[50%:]"}, {"path": [path, path]}):
        with pytest.raises(DataError, match=r"row 2: `chosen` is a number \(5\)"):
            load_rows({**source, "fields": names})
    written(tmp_path / "rows.jsonl", [{**row, "said": str(row["said"])} for row in rows])
    assert load_rows({"path": path, "fields": names})[0] == {
        **{"prompt": "Why?", "chosen": "So 0", "rejected": "No", "id": '"x"'}
    }


@pytest.mark.parametrize("write", ["jsonl", "parquet", "two files"])
def test_rows_on_disk_are_read_and_prepared_as_those_in_memory(tmp_path, monkeypatch, write):
    path = written(tmp_path / "rows.jsonl", ROWS * 30)
    if write == "parquet":
        load_rows(path).to_parquet(path := str(tmp_path / "rows.parquet"))
    source = [path, written(tmp_path / "more.jsonl", ROWS)] if write == "two files" else path
    whole, done = load_rows(source), prepare(source, byte_level(eos_token="<eos>"), max_length=16)
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(load, "_LARGE", 1)
    monkeypatch.setattr(load, "_PIECE", 700)
    monkeypatch.setattr(spool, "IN_MEMORY", 1)
    rows, again = load_rows(source), prepare(source, byte_level(eos_token="<eos>"), max_length=16)
    assert arrow_table(rows).column(0).num_chunks > 1
    assert rows.to_list() == whole.to_list()
    assert rows.features == whole.features
    assert (again.report, again.row_digests) == (done.report, done.row_digests)
    assert again.dataset.to_list() == done.dataset.to_list()
    assert again.report.duplicates == 29 * 50 + (50 if write == "two files" else 0)
    assert list(temporary.iterdir()) == []
    restored = [prepare_cached(source, byte_level(eos_token="<eos>"), folder=tmp_path, max_length=16) for _ in range(2)]
    assert [one.report for one in restored] == [done.report] * 2
    assert list(restored[1].prompt_digests) == list(done.prompt_digests)


def test_pieces_of_other_types_are_read_whole(tmp_path, monkeypatch):
    """Also what is wrong with a row is said as it is of a small file."""
    mixed = [*ROWS[:20], {**ROWS[20], "n": 0.5}, {**ROWS[21], "extra": "x"}]
    path = written(tmp_path / "rows.jsonl", mixed)
    whole = load_rows(path)
    broken = written(tmp_path / "broken.jsonl", [*ROWS, ["no row"]])
    with pytest.raises(DataError) as small:
        load_rows(broken)
    monkeypatch.setattr(load, "_LARGE", 1)
    monkeypatch.setattr(load, "_PIECE", 7)
    assert load_rows(path).to_list() == whole.to_list()
    with pytest.raises(DataError) as large:
        load_rows(broken)
    assert str(small.value) == str(large.value)


PAIR = {"prompt": "p", "chosen": " yes", "rejected": " no"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([PAIR, PAIR | {f"c{k}": k for k in range(30)}], "33 columns in all"),
        ([PAIR | {f"c{n}_{k}": k for k in range(9)} for n in range(3)], "30 columns in all"),
        ([PAIR | {"meta": [{f"c{n}_{k}": k for k in range(9)}]} for n in range(3)], "`meta` have 27 different keys"),
    ],
    ids=["one row", "other columns in each row", "keys of objects"],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_more_columns_than_can_be_worked_with_are_refused_at_once(tmp_path, monkeypatch, rows, said, ending):
    """100,000 of them took minutes, most of all where each row had others; large files are not read a second time."""
    path = str(tmp_path / f"rows.{ending}")
    if ending == "parquet":
        load_rows(rows).to_parquet(path)
    else:
        written(path, rows)
    monkeypatch.setattr(tables, "MOST_FIELDS", 29)
    monkeypatch.setattr(load, "_LARGE", 1)
    monkeypatch.setattr(load, "read_file", lambda *_: pytest.fail("read a second time"))
    with pytest.raises(DataError, match=said):
        load_rows(path)
    monkeypatch.setattr(tables, "MOST_FIELDS", 33)
    assert len(load_rows(path)) == len(rows)


def test_a_row_of_more_completions_than_can_be_compared_is_a_fault_of_that_row():
    rows = [{"prompt": "p", "completions": [f" {k}" for k in range(count)]} for count in (3, 1001)]
    with pytest.raises(DataError, match="row 2: `completions` has 1,001 completions"):
        prepare(rows, byte_level(eos_token="<eos>"), kind="ranked", max_length=16)
    assert len(prepare(rows[:1], byte_level(eos_token="<eos>"), kind="ranked", max_length=16).dataset) == 1


@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_text_that_would_fill_the_memory_is_a_fault_of_its_row(monkeypatch, form):
    """A tokenizer takes 50 bytes of memory a character: one row of 200 MB took 11 GB."""
    monkeypatch.setattr(values, "_MOST_CHARACTERS", 119)
    row = PAIR | {"prompt": "yes " * 30}
    if form == "messages":
        answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
        row = answers | {"prompt": [{"role": "user", "content": "ab " * 10}] * 4}
    with pytest.raises(DataError, match="row 1: `prompt` has 120 characters"):
        prepare([row], byte_level(eos_token="<eos>"), max_length=16)


def test_texts_of_many_messages_are_looked_for_where_they_follow_each_other():
    """The definition, which looks for each in all of the rendering, is the oracle; it takes minutes of 100,000."""
    draw = random.Random(0)
    for _ in range(300):
        said = ["".join(draw.choices("ab ", k=draw.randint(0, 3))) for _ in range(6)]
        text = "|".join(said[place] for place in draw.sample(range(6), draw.randint(3, 6)))
        messages = [{"role": "user", "content": one} for one in said]
        lost = [place for place, one in enumerate(said) if one.strip() not in text]
        assert [place for _, place in lost_texts(messages, text)] == lost


def test_a_packed_line_that_is_no_row_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LINE", 10_000)
    bomb = written(tmp_path / "rows.jsonl.gz", [*ROWS[:2], {**ROWS[2], "prompt": "a" * 10**6}], gzip.open)
    with pytest.raises(DataError, match=r"line 3 of .* unpacks to more than 10,000 characters"):
        load_rows(bomb)
    fine = written(tmp_path / "fine.jsonl.gz", ROWS, gzip.open)
    assert len(load_rows(fine)) == len(ROWS)


def test_a_small_file_that_unpacks_to_a_huge_one_is_refused(tmp_path, monkeypatch):
    """Lines that are rows, and no end of them: each alone is fine, and all of them would fill the disk."""
    monkeypatch.setattr(files, "_UNPACKED", 100_000)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(ROWS[0]) + "\n").encode() * 20_000))
    with pytest.raises(DataError, match=r"unpacks to more than 200 times as many characters, at line \d+"):
        load_rows(path)
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    assert len(load_rows(path.with_suffix(""))) == 20_000
    pretty = tmp_path / "rows.json.gz"
    pretty.write_bytes(gzip.compress(json.dumps([ROWS[0]] * 20_000, indent=1).encode()))
    with pytest.raises(DataError, match="unpacks to more than 200 times"):
        load_rows(pretty)


@pytest.fixture
def bucket():
    import fsspec

    store = fsspec.filesystem("memory")
    for place, rows in (("a.jsonl", ROWS[:3]), ("more/a.jsonl", ROWS[3:5]), ("more/deep/b.jsonl.gz", ROWS[5:6])):
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        store.pipe_file(f"/bucket/{place}", gzip.compress(text) if place.endswith("gz") else text)
    yield store
    store.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("address", "numbers"),
    [
        ("memory://bucket/a.jsonl", [0, 1, 2]),
        ("memory://bucket/more", [3, 4, 5]),
        ("memory://bucket/*.jsonl", [0, 1, 2]),
        ("memory://bucket/**/*.jsonl", [0, 1, 2, 3, 4]),
        (["memory://bucket/more/deep/b.jsonl.gz", "memory://bucket/a.jsonl"], [5, 0, 1, 2]),
    ],
)
def test_rows_in_an_object_store_are_those_of_the_files(bucket, address, numbers):
    assert load_rows(address)["prompt"] == [f"row {n}:" for n in numbers]


def test_what_is_not_in_an_object_store_is_said(bucket):
    with pytest.raises(DataError, match="there is nothing at `memory://bucket/none`"):
        load_rows("memory://bucket/none")
    with pytest.raises(DataError, match=r"of addresses only those of object stores are read \(s3://"):
        load_rows("https://example.org/rows.jsonl")
    bucket.pipe_file("/bucket/out/../../../escaped.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(DataError, match="which is no place of a file"):
        load_rows("memory://bucket/out")
    with pytest.raises(DataError, match="could not be fetched") as caught:
        load_rows("gs://user:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value)
