"""A prepared set is made once and found again by what it depends on, and by nothing else (INV-37)."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from data.samples import CHATML, assistant, byte_level, chat, chat_tokenizer, pair, user
from tether.data import overlap, prepare, prepare_cached
from tether.data.prepare import cache as cache_module
from tether.data.prepare.cache import cache_key, remove_oldest, rows_digest, tokenizer_state
from tether.errors import ConfigError, DataError

ROWS = [pair(f"{n} + {n} =", f" {2 * n}", f" {n}{n}") for n in range(1, 40)]
WORKER = Path(__file__).parent / "cache_worker.py"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each preparation had."""
    calls: list[int] = []

    def counting(rows: Dataset, *arguments: Any, **options: Any) -> Any:
        calls.append(len(rows))
        return prepare(rows, *arguments, **options)

    counting.__kwdefaults__ = prepare.__kwdefaults__
    monkeypatch.setattr(cache_module, "prepare", counting)
    return calls


def run(folder: Path | None, rows: Any = ROWS, tokenizer: Any = None, **options: Any) -> Any:
    tokenizer = tokenizer or byte_level(eos_token="<eos>")
    return prepare_cached(rows, tokenizer, folder=folder, **{"max_length": 16, **options})


def same(found: Any, expected: Any) -> None:
    assert found.dataset.features == expected.dataset.features
    assert found.dataset[:] == expected.dataset[:]
    assert found.report == expected.report
    assert (found.row_digests, found.prompt_digests) == (expected.row_digests, expected.prompt_digests)
    assert found.dataset._fingerprint == expected.dataset._fingerprint


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (ROWS, {}),
        ([*ROWS, pair(), pair(chosen="")], {"truncation_mode": "keep_end", "max_length": 6}),
        ([{**row, "weight": 0.1 * n, "spare": n} for n, row in enumerate(ROWS)], {"max_length": None}),
        (ROWS, {"kind": "unpaired"}),
        (
            [{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}],
            {"kind": "completion", "turns": "last", "max_length": None},
        ),
    ],
    ids=["pairs", "drops and cuts", "numbers", "unpaired", "turns"],
)
def test_an_entry_gives_back_all_that_was_prepared(rows, options, tmp_path, counted):
    tokenizer = chat_tokenizer(CHATML)
    first = run(tmp_path, rows, tokenizer, **options)
    second = run(tmp_path, rows, tokenizer, **options)
    assert counted == [len(rows)]
    same(second, first)
    same(second, prepare(rows, tokenizer, **{"max_length": 16, **options}))
    assert overlap(second, first).rows == first.dataset.num_rows
    assert second.report.to_dict() == first.report.to_dict()
    assert [path.suffix for path in tmp_path.iterdir()] == [".arrow"], "no lock and no half-written file is left"


def test_an_entry_found_is_said_in_one_line_and_has_the_name_that_was_asked_for(tmp_path, caplog):
    caplog.set_level(logging.INFO, "tether")
    run(tmp_path, name="train")
    assert not caplog.messages
    found = run(tmp_path, name="held out")
    assert caplog.messages == ["held out: 39 prepared rows from the cache"]
    assert found.report.name == "held out"


def test_the_key_is_of_content(tmp_path, counted):
    """However rows are stored, and whoever asks; the tokenizer may have padded and truncated something before."""
    tokenizer = byte_level(eos_token="<eos>")
    run(tmp_path, ROWS, tokenizer)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    whole = Dataset.from_list(ROWS)
    parted = concatenate_datasets([whole.select(range(7)), whole.select(range(7, len(ROWS)))])
    turned = Dataset.from_list(ROWS[::-1]).select(range(len(ROWS) - 1, -1, -1))
    again = byte_level(eos_token="<eos>")
    again.pad_token = None
    again(["a b c d"], truncation=True, max_length=2)
    for rows in (str(file), parted, turned, whole.with_format("numpy")):
        run(tmp_path, rows, again, num_proc=1, name="other")
    # What else the caller's process knows, such as functions that a data set was mapped with, is not part of it.
    other = []
    run(tmp_path, whole.map(lambda row: row | {"prompt": row["prompt"] + ("" if other is not None else "x")}), again)
    assert counted == [len(ROWS)]


def test_nothing_that_matters_is_left_out_of_the_key(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer(CHATML)
    rows = Dataset.from_list([chat(), chat("Why?", "Because.", "No.")])

    def key(rows=rows, tokenizer=tokenizer, **options):
        return cache_key(rows, tokenizer, {"max_length": 16, **options})

    keys = [key(), key(rows.select([1, 0])), key(rows.select([0])), key(rows.add_column("spare", [1, 2]))]
    keys += [key(max_length=15), key(truncation_mode="middle"), key(boundary="drop"), key(kind="unpaired")]
    keys.append(key(turns="last"))
    changed = chat_tokenizer(CHATML.replace("assistant", "model"))
    keys += [key(tokenizer=changed), key(tokenizer=byte_level(eos_token="<eos>"))]
    for change in (
        lambda one: one.add_tokens(["Because"]),
        lambda one: setattr(one, "eos_token", "<eos>"),
        lambda one: setattr(one, "split_special_tokens", True),
    ):
        changed = chat_tokenizer(CHATML)
        change(changed)
        keys.append(key(tokenizer=changed))
    monkeypatch.setattr(cache_module, "_code", lambda: "changed")
    keys.append(key())
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_defaults_and_what_is_said_make_one_key():
    rows, tokenizer = Dataset.from_list(ROWS), byte_level(eos_token="<eos>")
    said = cache_key(rows, tokenizer, {"max_length": 8, "kind": "pair", "boundary": "split"})
    assert said == cache_key(rows, tokenizer, {"max_length": 8})


def test_a_template_that_writes_the_date_is_kept_for_a_day():
    template = CHATML + "{% if false %}{{ strftime_now('%d') }}{% endif %}"
    assert tokenizer_state(chat_tokenizer(template))["day"]
    assert tokenizer_state(chat_tokenizer(CHATML))["day"] is None


def test_code_of_others_is_not_cached(tmp_path, counted, caplog):
    """What a tokenizer of the user's own does cannot be told from its state."""

    class Own(type(byte_level(eos_token="<eos>"))):
        pass

    own = byte_level(eos_token="<eos>")
    own.__class__ = Own
    caplog.set_level(logging.INFO, "tether")
    for _ in range(2):
        run(tmp_path, tokenizer=own)
    patched = byte_level(eos_token="<eos>")
    patched.apply_chat_template = lambda *_, **__: ""
    run(tmp_path, tokenizer=patched)
    assert len(counted) == 3
    assert not list(tmp_path.iterdir())
    assert "not cached" in caplog.text


@pytest.mark.parametrize("damage", ["empty", "cut", "ids", "digests", "note", "other"])
def test_a_damaged_entry_is_made_again(damage, tmp_path, counted, caplog):
    expected = run(tmp_path)
    path = next(tmp_path.glob("*.arrow"))
    whole = path.read_bytes()
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "other":
        path.write_text("not Arrow at all")
    else:
        if damage == "ids":
            table = table.set_column(0, "prompt_ids", pa.array([[1]] * len(table), pa.list_(pa.int32())))
        elif damage == "digests":
            table = table.set_column(3, "row_digest", pa.array([b"0" * 16] * len(table), pa.binary(16)))
        else:
            table = table.replace_schema_metadata({b"tether": b'{"report": {"rows": 3}}'})
        path.unlink()  # it is mapped into memory
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    same(run(tmp_path), expected)
    assert len(counted) == 2
    assert "prepared again" in caplog.text
    same(run(tmp_path), expected)
    assert len(counted) == 2, "the damaged entry was replaced"


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path, counted, caplog):
    (tmp_path / "file").write_text("")
    assert len(run(tmp_path / "file" / "folder").dataset) == len(ROWS)
    assert "not cached" in caplog.text


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, caplog):
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(cache_module.os, "replace", full)
    assert len(run(tmp_path).dataset) == len(ROWS)
    assert "no space left" in caplog.text
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_no_folder_keeps_nothing(counted):
    run(None)
    run(None)
    assert len(counted) == 2


def test_rows_that_cannot_be_used_are_no_entry(tmp_path):
    for _ in range(2):
        with pytest.raises(DataError, match="none of the"):
            run(tmp_path, [pair(chosen="")])
    assert not list(tmp_path.glob("*.arrow"))


def test_the_hash_of_rows_sees_order_and_place_of_text():
    rows = [Dataset.from_list([{"a": "x", "b": "yz"}]), Dataset.from_list([{"a": "xy", "b": "z"}])]
    rows += [Dataset.from_list([{"b": "yz", "a": "x"}]), Dataset.from_list([{"a": "x", "b": None}])]
    assert len(set(map(rows_digest, rows))) == len(rows)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(WORKER), str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_inv_37_of_two_processes_one_prepares(tmp_path):
    """INV-37. Both begin; the other waits for the file, without a collective, and gets the same."""
    processes = [start(tmp_path, str(rank), "2") for rank in range(2)]
    found = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    assert sorted(one["prepared"] for one in found) == [0, 1]
    assert found[0]["fingerprint"] == found[1]["fingerprint"]
    assert found[0]["report"] == found[1]["report"]
    assert found[0]["digests"] == found[1]["digests"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_process_that_dies_blocks_no_other(tmp_path, counted):
    """A lock is taken from a process that is killed while it prepares; what it had begun to write goes."""
    dying = start(tmp_path, "0", "1", "die")
    while not (tmp_path / "entries").is_dir() or not list((tmp_path / "entries").glob("*.tmp")):
        assert dying.poll() is None, dying.communicate()
        time.sleep(0.05)
    dying.kill()
    dying.communicate()
    rows = [pair(f"{n} + {n} =", f" {2 * n}", f" {n}{n}") for n in range(3000)]
    start_time = time.perf_counter()
    assert len(run(tmp_path / "entries", rows).dataset) == len(rows)
    assert time.perf_counter() - start_time < 60
    assert counted == [len(rows)]
    assert [path.suffix for path in (tmp_path / "entries").iterdir()] == [".arrow"]


def test_a_lock_that_is_held_is_waited_for(tmp_path, monkeypatch, counted, caplog):
    """Negative control of the two above: while another holds the lock, nothing is prepared."""
    caplog.set_level(logging.INFO, "tether")
    expected = run(tmp_path)
    path = next(tmp_path.glob("*.arrow"))
    kept = path.read_bytes()
    path.unlink()
    lock = FileLock(path.with_suffix(".lock"), thread_local=False)
    lock.acquire()
    tried = FileLock.acquire

    def acquire(self: FileLock, timeout: float | None = None, **options: Any) -> Any:
        if timeout is None:  # the second, patient try: the other one finishes now
            assert counted == [len(ROWS)]
            path.write_bytes(kept)
            lock.release()
        return tried(self, timeout, **options)

    monkeypatch.setattr(FileLock, "acquire", acquire)
    same(run(tmp_path), replace(expected))
    assert counted == [len(ROWS)]
    assert "waiting for the process" in caplog.text


# -- what is removed ---------------------------------------------------------------------------------------------------


def entry(folder: Path, name: str, days: float, size: int = 1 << 20) -> Path:
    """A file of a megabyte that was last used some days ago."""
    path = folder / f"{name}.arrow"
    path.write_bytes(b"\0" * size)
    os.utime(path, (time.time() - days * 86400,) * 2)
    return path


def test_the_entries_that_were_not_used_for_longest_are_removed(tmp_path: Path) -> None:
    new, week, month, year = (entry(tmp_path, str(days), days) for days in (1, 8, 30, 365))
    assert remove_oldest(tmp_path, limit=4 / 1024) == []
    assert remove_oldest(tmp_path, limit=2 / 1024) == [year, month]
    assert new.is_file()
    assert week.is_file()
    assert remove_oldest(tmp_path, limit=0.0) == [week], "what was used within a week stays"
    assert list(tmp_path.iterdir()) == [new]


def test_reading_an_entry_is_using_it_and_an_open_one_can_still_be_read(
    tmp_path: Path, chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on with rows whose entry another run removes."""
    monkeypatch.setenv("TETHER_CACHE_GIB", "0")
    rows = [chat(question=f"Is it {number}?") for number in range(3)]
    prepare_cached(rows, chatml, folder=tmp_path, max_length=None)
    [path] = tmp_path.glob("*.arrow")
    os.utime(path, (1.0, 1.0))
    found = prepare_cached(rows, chatml, folder=tmp_path, max_length=None)
    assert path.stat().st_mtime > time.time() - 600
    os.utime(path, (1.0, 1.0))
    prepare_cached(rows[:1], chatml, folder=tmp_path, max_length=None)
    assert not path.exists()
    assert len(list(tmp_path.glob("*.arrow"))) == 1, "the new entry stays"
    assert [dict(row) for row in found.dataset] == [dict(row) for row in prepare(rows, chatml, max_length=None).dataset]


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TETHER_CACHE_GIB", "much")
    with pytest.raises(ConfigError, match="TETHER_CACHE_GIB is 'much'; it must be a number of GiB"):
        remove_oldest(tmp_path)
