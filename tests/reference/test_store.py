"""The store keeps what was put, under keys that cover what changes the number and nothing else (INV-13, 14)."""

from __future__ import annotations

import json
import logging
import os
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile

from tether import Namespace, Store
from tether.errors import ConfigError, StoreError
from tether.reference.store.index import KeyIndex
from tether.reference.store.parts import PartIndex, PartValues, decode_part, encode_part
from tether.reference.store.tools import compact_store, describe_store, export_store

SPACE = Namespace("s2:00ff", "float32")


def contents(count, seed=0):
    """Digests of completions and their values, as a deterministic function of both."""
    random = np.random.default_rng(seed)
    keys = [random.bytes(16) for _ in range(count)]
    return keys, [value_of(key) for key in keys]


def value_of(key):
    """What is right for a key: anyone can say of a stored value whether it is wrong."""
    random = np.random.default_rng(int.from_bytes(key, "little"))
    return -random.random(random.integers(1, 40)).astype(np.float32)


@pytest.fixture(scope="module")
def bucket():
    """A bucket of an S3 server of ours; `make test-object-store` installs it apart and runs what needs it."""
    moto, _, s3fs = (pytest.importorskip(name) for name in ("moto.server", "moto", "s3fs"))
    server = moto.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    reached = {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", reached)
        s3fs.S3FileSystem().mkdir("tether")
        yield "s3://tether"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def path(request, tmp_path):
    """A local folder, whose parts are mapped; an object store, of whose parts copies are mapped."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}"
    return str(tmp_path / "store") if request.param == "file" else f"memory://{uuid.uuid4().hex}"


def parts(path):
    files, root = fsspec.core.url_to_fs(path)
    return files, sorted(files.find(root))


def rewrite(path, change, number=0):
    """Change the bytes of a part in place, as a failing disk would."""
    files, names = parts(path)
    files.pipe_file(names[number], change(files.cat_file(names[number])))


def test_what_is_put_is_found_now_and_by_others_after_a_flush(path):
    keys, values = contents(50)
    store, other = Store(path, SPACE), Store(path, SPACE)
    store.put(keys[:30], values[:30])
    assert [value is not None for value in store.get(keys)] == [True] * 30 + [False] * 20
    other.refresh()
    assert not other.holds(keys).any()
    store.flush()
    store.put(keys[20:], values[20:])
    store.flush()
    other.refresh()
    for reader in (store, other, Store(path, SPACE)):
        assert len(reader) == 50
        for found, value in zip(reader.get(keys), values, strict=True):
            np.testing.assert_array_equal(found, value)
    assert len(parts(path)[1]) == 2


def test_a_look_up_in_any_order_equals_a_dictionary():
    """The fast path against the plain one, with keys that share their first half, and a negative control."""
    random = np.random.default_rng(0)
    keys = list({b"same" * 2 + random.bytes(8) for _ in range(100)} | {random.bytes(16) for _ in range(300)})
    index = KeyIndex()
    for number, start in enumerate(range(0, len(keys), 150)):
        packed = np.frombuffer(b"".join(keys[start : start + 150]), np.uint8).reshape(-1, 16)
        index.add([(number, PartIndex(SPACE, packed, np.zeros(len(packed), np.uint32), tokens=0))])
    asked = [keys[i] for i in random.permutation(len(keys))] + [random.bytes(16) for _ in range(50)]
    plain = {key: divmod(place, 150) for place, key in enumerate(keys)}
    found = [(index.part[i], index.row[i]) if i >= 0 else None for i in index.find(asked)]
    assert found == [plain.get(key) for key in asked]
    assert index.nbytes / len(keys) <= 64
    index.low[:] = index.low[::-1].copy()
    assert (index.find(asked[: len(keys)]) < 0).any()


def test_the_index_takes_at_most_64_bytes_a_completion(tmp_path):
    keys, values = contents(2000)
    with Store(tmp_path, SPACE) as store:
        store.put(keys, values)
    assert store.index_bytes / len(store) == 28
    assert Store(tmp_path, SPACE).index_bytes / 2000 == 28


@pytest.mark.parametrize("change", [{"fingerprint": "s2:ff"}, {"numerics": "bfloat16"}, {"dtype": "float16"}])
def test_another_reference_or_numerics_shares_a_folder_and_no_entry(path, change):
    """INV-13."""
    keys, values = contents(3)
    with Store(path, SPACE) as store:
        store.put(keys, values)
    other = Store(path, Namespace(**{"fingerprint": "s2:00ff", "numerics": "float32", **change}))
    assert not other.holds(keys).any()
    with other:
        other.put(keys, [value - 1 for value in values])
    np.testing.assert_array_equal(Store(path, SPACE).get(keys)[0], values[0])


def test_float16_is_kept_on_request(path):
    keys, values = contents(20)
    space = Namespace("s2:00ff", "float32", "float16")
    store = Store(path, space)
    store.put(keys, values)
    before = store.get(keys)
    store.flush()
    for found, pending, value in zip(store.get(keys), before, values, strict=True):
        np.testing.assert_array_equal(found, value.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(found, pending)
        assert found.dtype == np.float32


def test_values_that_are_no_numbers_are_refused(tmp_path):
    store = Store(tmp_path, SPACE)
    for value in ([-1.0, float("nan")], [[-1.0]], [float("-inf")]):
        with pytest.raises(StoreError, match="no finite numbers"):
            store.put([b"k" * 16], [np.array(value, np.float32)])
    with pytest.raises(StoreError, match="no finite numbers in float16"):
        Store(tmp_path, Namespace("a", "b", "float16")).put([b"k" * 16], [np.array([-1e6])])
    assert not store.holds([b"k" * 16]).any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_part_is_an_ordinary_arrow_file(tmp_path, dtype):
    """What any program sees in it, and what is read by row, a completion without tokens included."""
    random = np.random.default_rng(0)
    keys = [random.bytes(16) for _ in range(3000)]
    values = [random.normal(size=length).astype(dtype) for length in random.integers(0, 5, 3000)]
    data = encode_part(Namespace("s2:00ff", "float32", dtype), keys, values)
    (tmp_path / "part.arrow").write_bytes(data)
    table = pa.ipc.open_file(tmp_path / "part.arrow").read_all()
    assert table["key"].to_pylist() == keys
    assert table["token_logps"].to_pylist() == [value.tolist() for value in values]
    found, index = PartValues(data), decode_part(data)
    assert [key.tobytes() for key in index.keys] == keys
    assert index.tokens == sum(map(len, values))
    for row, value in enumerate(values):
        np.testing.assert_array_equal(found[row], value)
        assert found[row].dtype == dtype


def test_a_part_of_completions_without_tokens_is_read(path):
    with Store(path, SPACE) as store:
        store.put([b"k" * 16], [np.empty(0)])
    assert [value.tolist() for value in Store(path, SPACE).get([b"k" * 16])] == [[]]


def test_opening_a_remote_store_does_not_fetch_its_values(monkeypatch):
    """A part is read by column: of a thousand completions of 1000 tokens, 4 MB, no more than the keys come."""
    path, fetched = f"memory://{uuid.uuid4().hex}", []
    keys, _ = contents(1000)
    with Store(path, SPACE) as store:
        store.put(keys, [np.zeros(1000)] * 1000)
    read = MemoryFile.read

    def counted(self, *args):
        data = read(self, *args)
        fetched.append(len(data))
        return data

    monkeypatch.setattr(MemoryFile, "read", counted)
    assert Store(path, SPACE).holds(keys).all()
    assert 20_000 <= sum(fetched) <= 25_000


def test_parts_that_are_read_use_no_open_files(tmp_path):
    """A run of days on many processes leaves more parts than a process may have files open."""
    keys, values = contents(50)
    for key, value in zip(keys, values, strict=True):
        with Store(tmp_path, SPACE) as store:
            store.put([key], [value])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    store = Store(tmp_path, SPACE)
    for found, value in zip(store.get(keys), values, strict=True):
        np.testing.assert_array_equal(found, value)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_changed_byte_of_a_part_makes_a_wrong_value(tmp_path, dtype):
    """INV-14: every byte in turn, those of pyarrow's own structure too; each value is right or missing."""
    keys, values = contents(4)
    space = Namespace("s2:00ff", "float32", dtype)
    with Store(tmp_path, space) as store:
        store.put(keys, values)
    (part,) = (path for path in tmp_path.rglob("*.arrow"))
    sound, missing = part.read_bytes(), 0
    for place in range(len(sound)):
        part.write_bytes(sound[:place] + bytes([sound[place] ^ 0xFF]) + sound[place + 1 :])
        for found, value in zip(Store(tmp_path, space).get(keys), values, strict=True):
            missing += found is None
            if found is not None:
                np.testing.assert_array_equal(found, value.astype(dtype))
    assert missing > len(sound)  # negative control: most of the bytes matter


@pytest.mark.parametrize("change", ["columns", "batches"])
def test_a_part_that_another_program_rewrote_is_read_right_or_reported(tmp_path, change):
    keys, values = contents(20)
    with Store(tmp_path, SPACE) as store:
        store.put(keys, values)
    (part,) = (path for path in tmp_path.rglob("*.arrow"))
    table = pa.ipc.open_file(part.read_bytes()).read_all()
    table = table.select(["token_logps", "crc", "key"]) if change == "columns" else table
    with pa.ipc.new_file(part, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    again = Store(tmp_path, SPACE)
    assert again.get(keys) == [None] * 20
    words = "its columns are others" if change == "columns" else "keys do not match"
    assert words in again.damaged[part.relative_to(tmp_path).as_posix()]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"no Arrow file at all",
        lambda data: data[:4] + bytes(len(data) - 8) + data[-4:],
    ],
    ids=["torn", "empty", "other", "zeros"],
)
def test_a_part_that_cannot_be_read_is_reported_and_its_entries_are_missing(path, change, caplog):
    """INV-14: never 0.0; what other parts hold is found all the same."""
    keys, values = contents(20)
    for half in (slice(0, 10), slice(10, 20)):
        with Store(path, SPACE) as store:
            store.put(keys[half], values[half])
    damaged = Store(path, SPACE)
    first = [value is not None for value in damaged.get(keys)]
    rewrite(path, change)
    with caplog.at_level(logging.WARNING, logger="tether"):
        store = Store(path, SPACE)
    assert sum(first) == 20
    found = store.get(keys)
    missing = [i for i, value in enumerate(found) if value is None]
    assert missing in (list(range(10)), list(range(10, 20)))
    assert len(store.damaged) == 1
    assert "computed again" in caplog.text
    assert len(describe_store(path).damaged) == 1
    with store:
        store.put(keys, values)
    for value, right in zip(Store(path, SPACE).get(keys), values, strict=True):
        np.testing.assert_array_equal(value, right)


def test_a_changed_bit_of_a_value_is_noticed_when_it_is_read(path, caplog):
    keys, values = contents(20)
    with Store(path, SPACE) as store:
        store.put(keys, values)
    files, (name,) = parts(path)
    offset = files.cat_file(name).index(values[4].tobytes())
    rewrite(path, lambda data: data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
    store = Store(path, SPACE)
    assert store.holds(keys).all()  # the keys are sound
    found = store.get(keys)
    assert [i for i, value in enumerate(found) if value is None] == list(range(20)) or all(
        value is None or np.array_equal(value, right) for value, right in zip(found, values, strict=True)
    )
    assert any(value is None for value in found)
    assert store.get(keys) == [None] * 20
    assert "a value does not match its checksum" in caplog.text
    assert not describe_store(path).damaged
    assert len(describe_store(path, values=True).damaged) == 1
    store.put(keys, values)
    store.flush()
    again = Store(path, SPACE)
    for _ in range(2):
        for value, right in zip(again.get(keys), values, strict=True):
            np.testing.assert_array_equal(value, right)


def test_a_part_that_vanishes_is_missing_or_still_readable_and_never_wrong(path):
    """Another process compacts or deletes while this one reads."""
    keys, values = contents(30)
    for start in range(0, 30, 10):
        with Store(path, SPACE) as store:
            store.put(keys[start : start + 10], values[start : start + 10])
    reader = Store(path, SPACE)
    assert compact_store(path) == (3, 1)
    for _ in range(2):
        for value, right in zip(reader.get(keys), values, strict=True):
            np.testing.assert_array_equal(value, right)
        reader.refresh()
    assert len(reader) == 30
    files, names = parts(path)
    files.rm_file(names[0])
    reader.refresh()
    assert reader.get(keys) == [None] * 30


def test_two_writers_lose_nothing_and_compaction_keeps_each_once(path):
    """INV-14."""
    keys, values = contents(40)
    one, two = Store(path, SPACE), Store(path, SPACE)
    for start in range(0, 40, 4):
        for store, places in ((one, range(start, start + 4)), (two, range(start, min(start + 8, 40)))):
            store.put([keys[i] for i in places], [values[i] for i in places])
            store.flush()
    before = describe_store(path)
    assert before.completions == 40
    assert before.namespaces[0].repeated > 0
    assert compact_store(path, part_bytes=1000)[0] == before.namespaces[0].parts
    after = describe_store(path, values=True)
    assert (after.completions, after.namespaces[0].repeated, after.damaged) == (40, 0, {})
    assert 1 < after.namespaces[0].parts < before.namespaces[0].parts
    for value, right in zip(Store(path, SPACE).get(keys), values, strict=True):
        np.testing.assert_array_equal(value, right)


def test_compaction_leaves_damaged_parts_and_removes_old_unfinished_files(tmp_path, monkeypatch):
    keys, values = contents(30)
    for start in range(0, 30, 10):
        with Store(tmp_path, SPACE) as store:
            store.put(keys[start : start + 10], values[start : start + 10])
    rewrite(str(tmp_path), lambda data: data[:-20], number=1)
    folder = next(tmp_path.iterdir())
    (folder / ".writing-killed.arrow").write_bytes(b"half")
    report = describe_store(tmp_path)
    assert (report.completions, len(report.damaged), len(report.leftovers)) == (20, 1, 1)
    assert compact_store(tmp_path) == (2, 1)
    assert (folder / ".writing-killed.arrow").exists()  # its writer may be alive
    monkeypatch.setattr("tether.reference.store.tools._ABANDONED_SECONDS", -1.0)
    compact_store(tmp_path)
    report = describe_store(tmp_path)
    assert (report.completions, len(report.damaged), len(report.leftovers)) == (20, 1, 0)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_export_has_every_completion_once_in_plain_columns(path, tmp_path, kind):
    keys, values = contents(10)
    for space in (SPACE, Namespace("s2:11", "bfloat16", "float16")):
        for _ in range(2):
            store = Store(path, space)
            store._index = KeyIndex()  # forgets what is there, as a second writer would not have known it
            with store:
                store.put(keys, values)
    target = tmp_path / f"out.{kind}"
    assert export_store(path, target) == 20
    if kind == "parquet":
        rows = pq.read_table(target).to_pylist()
    else:
        rows = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
    right = {SPACE.key(key).hex(): value for key, value in zip(keys, values, strict=True)}
    mine = {row["key"]: row for row in rows if row["reference"] == "s2:00ff"}
    assert mine.keys() == right.keys()
    for key, row in mine.items():
        np.testing.assert_array_equal(np.array(row["token_logps"], np.float32), right[key])
    assert {row["numerics"] for row in rows} == {"float32", "bfloat16, kept in float16"}
    with pytest.raises(ConfigError, match="this one exists"):
        export_store(path, target)
    rewrite(path, lambda data: data[:-20])
    with pytest.raises(StoreError, match="damaged parts"):
        export_store(path, tmp_path / f"again.{kind}")
    assert not (tmp_path / f"again.{kind}").exists()


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="There is no store"):
        describe_store(tmp_path / "nothing")
    (tmp_path / "file").write_text("text")
    with pytest.raises(ConfigError, match="is a file"):
        Store(tmp_path / "file", SPACE)
    with pytest.raises(ConfigError, match="cannot be reached"):
        Store("nonsense://bucket/store", SPACE)
    with pytest.raises(StoreError, match="float32 or float16"):
        Namespace("a", "b", "int8")


def test_a_disk_that_refuses_loses_nothing_that_was_put(tmp_path, monkeypatch):
    keys, values = contents(5)
    store = Store(tmp_path, SPACE)
    store.put(keys, values)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("tether.reference.store.files.os.replace", full)
        with pytest.raises(StoreError, match="No space left"):
            store.flush()
    store.flush()
    assert Store(tmp_path, SPACE).holds(keys).all()
    assert not [name for name in Path(tmp_path).rglob("*") if name.name.startswith(".writing-")]


def test_parts_are_written_when_they_are_large_or_late(tmp_path):
    keys, values = contents(100)
    store = Store(tmp_path, SPACE, flush_bytes=400, flush_seconds=1e9)
    for key, value in zip(keys, values, strict=True):
        store.put([key], [value])
    assert len(parts(str(tmp_path))[1]) > 5
    late = Store(tmp_path / "late", SPACE, flush_bytes=10**9, flush_seconds=0.0)
    late.put(keys[:1], values[:1])
    assert Store(tmp_path / "late", SPACE).holds(keys[:1]).all()


def test_a_folder_that_takes_no_files_is_known_with_the_first_completion(tmp_path, monkeypatch):
    """Not when half a minute of work is to be written; what is there is read all the same."""
    keys, values = contents(3)
    with Store(tmp_path / "store", SPACE) as store:
        store.put(keys[:2], values[:2])
    assert [path.suffix for path in (tmp_path / "store").rglob("*.*")] == [".arrow"], "the trial leaves nothing"

    def refuse(*args, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    store = Store(tmp_path / "store", SPACE)
    assert np.array_equal(store.get(keys[:1])[0], values[0])
    store.put(keys[:2], values[:2])  # nothing new, so that nothing is to be written
    with pytest.raises(StoreError, match=r"could not be written: .*Read-only file system"):
        store.put(keys, values)
    assert store.get(keys[2:]) == [None]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="could not be written"):
        Store(tmp_path / "file" / "below", SPACE).put(keys, values)
