"""Large files take memory in proportion to what is needed at a time, and packed ones cannot fill it."""

from __future__ import annotations

import gzip
import json

import pytest

from tether.data.sources import files, load
from tether.data.sources.load import load_rows
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


def test_a_packed_line_that_is_no_row_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LINE", 10_000)
    bomb = written(tmp_path / "rows.jsonl.gz", [*ROWS[:2], {**ROWS[2], "prompt": "a" * 10**6}], gzip.open)
    with pytest.raises(DataError, match=r"line 3 of .* unpacks to more than 10,000 characters"):
        load_rows(bomb)
    fine = written(tmp_path / "fine.jsonl.gz", ROWS, gzip.open)
    assert len(load_rows(fine)) == len(ROWS)
