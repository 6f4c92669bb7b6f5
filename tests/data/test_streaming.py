"""A stream is the same rows, a part at a time (INV-33, 34)."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset, IterableDatasetDict

import streams
from support.format_examples import EXAMPLES
from support.image_rows import row as image_row
from tether.data import example_from_row, load_rows, prepare
from tether.data.prepare.job import Options
from tether.data.prepare.prefetch import Ahead
from tether.data.prepare.stream import PreparedStream
from tether.data.sources.stream import RowStream, is_streamed
from tether.errors import DataError
from tiny import pair_rows, tiny_tokenizer
from tiny_seq2seq import tiny_seq2seq_tokenizer
from tiny_vision import tiny_processor

TOKENIZER = tiny_tokenizer()
ROWS = pair_rows(47)
TALKS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in ROWS
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    streams.small_chunks(monkeypatch)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    table = pa.Table.from_pylist(rows)
    if path.name.endswith((".jsonl", ".json")):
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
    else:
        form = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, form(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=13)
    return str(path)


def streamed(source: Any, kind: Any = "pair") -> list[dict[str, Any]]:
    chunks = list(RowStream(source, kind).chunks())
    assert {len(chunk) for chunk in chunks[:-1]} <= {streams.ROWS_PER_CHUNK}
    return [row for chunk in chunks for row in streams.plain(chunk)]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow", "stream.arrow", "*.jsonl"]
)
def test_files_are_read_in_parts(name: str, tmp_path: Path) -> None:
    if name == "*.jsonl":
        write(tmp_path / "1.jsonl", ROWS[:23])
        write(tmp_path / "2.jsonl", ROWS[23:])
        source = str(tmp_path / name)
    else:
        source = write(tmp_path / name, ROWS)
    assert streamed(source) == streams.plain(load_rows(source)) == ROWS


def test_files_of_two_kinds_and_several_weighted_sources_are_joined_as_in_memory(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", ROWS[:15]), write(tmp_path / "b.parquet", ROWS[15:])]
    renamed = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in ROWS]
    fields = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    sources: list[Any] = [
        {"path": files[0], "weight": 0.5},
        {"path": renamed, "fields": fields, "weight": 1.75},
        {"path": Dataset.from_list(ROWS)},
        files[1],
    ]
    assert streamed(files) == ROWS
    assert streamed(sources) == streams.plain(load_rows(sources))
    assert len(streamed(sources)) > 100


def test_the_first_rows_of_a_source_are_the_same_in_memory_and_streamed(tmp_path: Path) -> None:
    many = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(1100)]
    files = [write(tmp_path / "a.jsonl", many), write(tmp_path / "b.parquet", many)]
    for count, sources in ((7, [*files, Dataset.from_list(many)]), (1001, files[:1]), (5000, [files])):
        for source in sources:
            rows = streams.plain(load_rows({"path": source, "first": count}))
            assert streamed({"path": source, "first": count}) == rows
            assert len(rows) == min(count, 2200 if source is files else 1100)
            assert [row["prompt"] for row in rows[:1100]] == [str(n) for n in range(min(count, 1100))]
    assert len(load_rows({"path": files[0], "first": 10, "weight": 2})) == 20


def test_data_sets_of_the_library_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Dataset.from_list(ROWS)
    lazy = IterableDataset.from_generator(lambda: iter(ROWS))
    assert is_streamed(lazy)
    assert not is_streamed(whole)
    for source in (whole, whole.to_iterable_dataset(), lazy, IterableDatasetDict(train=lazy), ROWS):
        assert streamed(source) == ROWS
    whole.save_to_disk(tmp_path / "saved")
    assert streamed(str(tmp_path / "saved")) == ROWS

    file, fetch, asked = write(tmp_path / "a.jsonl", ROWS), datasets.load_dataset, []

    def fetched(name: str, split: str, **options: Any) -> Any:
        asked.append((name, split, options))
        return fetch("json", data_files=file, split=split, cache_dir=str(tmp_path), **options)

    monkeypatch.setattr(datasets, "load_dataset", fetched)
    assert streamed("owner/pairs") == ROWS
    assert asked == [("owner/pairs", "train", {"streaming": True})]


@pytest.mark.sweep(12)
@pytest.mark.parametrize(("name", "kind", "row"), [(n, k, r) for n, k, r, _ in EXAMPLES], ids=str)
def test_rows_of_other_tools_are_converted_one_by_one(name: str, kind: str, row: dict[str, Any]) -> None:
    source = {"path": [row] * 25, "format": name}
    assert streamed(source, kind) == streams.plain(load_rows(source, kind=kind))  # type: ignore[arg-type]


def test_a_json_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    with pytest.raises(DataError, match=r"a\.json` is one JSON list, which cannot be streamed.*\(\.jsonl\)"):
        streamed(str(tmp_path / "a.json"))


LABELLED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 == 0} for i, row in enumerate(ROWS)]
TEXTS = [{"text": row["prompt"] + row["chosen"], "weight": 1.0 + i % 2} for i, row in enumerate(ROWS)]
RANKED = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], " it"]} for row in ROWS]
SETS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "pairs": (ROWS, {}),
    "pairs, cut": (ROWS, {"max_length": 30}),
    "pairs, long ones dropped": (ROWS, {"max_length": 60, "mode": "drop"}),
    "conversations": (TALKS, {}),
    "pairs as two rows": (ROWS, {"kind": "unpaired"}),
    "labelled": (LABELLED, {"kind": "unpaired"}),
    "texts": (TEXTS, {"kind": "completion"}),
    "ranked": (RANKED, {"kind": "ranked"}),
    "answers": (
        [{"messages": [*row["prompt"], *row["chosen"]]} for row in TALKS],
        {"kind": "completion", "turns": "assistant"},
    ),
}


def spoiled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With rows that cannot be used among them, all of the second chunk; and with rows that repeat others."""
    answer = next(name for name in ("rejected", "completion", "completions", "text", "messages") if name in rows[0])
    other = "chosen" if answer == "rejected" else answer
    unusable = {name: row for name, row in rows[0].items()}
    if answer == "rejected":
        unusable |= {"rejected": unusable["chosen"]}
    elif answer in ("completion", "text"):
        unusable |= {answer: ""}
    elif answer == "completions":
        unusable |= {answer: [" same", " same"]}
    else:
        unusable |= {answer: [rows[0][answer][0], {"role": "assistant", "content": ""}]}
    assert other in unusable
    return [*rows[:3], unusable, *rows[4:10], *[unusable] * 10, *rows[20:], rows[4], rows[25]]


@pytest.mark.sweep(6)
@pytest.mark.parametrize("processes", [None, 2])
@pytest.mark.parametrize("name", SETS)
def test_what_is_prepared_in_chunks_is_what_is_prepared_at_once(name: str, processes: int | None) -> None:
    """INV-34: the same ids, drops, counts and report."""
    rows, changes = SETS[name]
    options = Options(**{"max_length": 512, "num_proc": processes, **changes})
    rows = spoiled(rows)
    told = {key: getattr(options, key) for key in ("max_length", "kind", "turns", "boundary")}
    whole = prepare(rows, TOKENIZER, truncation_mode=options.mode, name="train", **told)
    stream = PreparedStream(RowStream(rows, options.kind), TOKENIZER, options)
    totals, ids, seen = stream.totals(), [], []
    with stream.chunks() as chunks:
        for chunk in chunks:
            totals.add(chunk.batch, stream.job_of(chunk))
            ids += chunk.table.to_pylist()
            seen += chunk.batch.digests[0]
    assert ids == whole.dataset.to_list()
    assert seen == list(whole.row_digests)
    found, expected = stream.report_of(totals).to_dict(), whole.report.to_dict()
    assert found.pop("fingerprint") != expected.pop("fingerprint")
    assert found == expected
    assert found["duplicates"] == 2 * (2 if name == "pairs as two rows" else 1)
    assert sum(found["dropped"].values()) >= 11
    assert stream.first.to_list() == ids[: len(stream.first)]


def test_the_first_rows_may_all_be_unusable() -> None:
    bad = [{**ROWS[0], "rejected": ROWS[0]["chosen"]}] * 25
    stream = PreparedStream(RowStream([*bad, *ROWS]), TOKENIZER, Options(64))
    assert stream.first["source_row"][:] == [25, 26, 27, 28, 29]
    assert stream.report.dropped["identical"] == 25
    with pytest.raises(DataError, match="none of the 25 rows can be used: 25 with chosen equal to rejected"):
        PreparedStream(RowStream(bad), TOKENIZER, Options(64))


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": 5, "rejected": 6}, r"row 36: `chosen` is a number"),
        ({"chosen": None}, r"row 36: `chosen` is missing"),
        ({"prompt": [{"role": "user", "content": "a"}]}, r"row 36: `prompt` is"),
        ({"weight": 2.0}, r"the column `weight` has its first value in row 36, and rows before it are trained on"),
        ({"images": ["a.png"]}, r"row 36: the column `images` holds"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("processes", [None, 2])
def test_a_row_that_is_wrong_is_named_and_those_before_it_come(
    changes: dict[str, Any], message: str, processes: int | None
) -> None:
    """INV-33: by its number in the whole stream."""
    rows = [*ROWS[:35], {**ROWS[35], **changes}, *ROWS[36:]]
    stream = PreparedStream(RowStream(rows), TOKENIZER, Options(64, num_proc=processes))
    came = []
    with stream.chunks() as chunks, pytest.raises(DataError, match=message):
        came.extend(chunk.number for chunk in chunks)
    assert came == [0, 1, 2]


def test_a_line_that_is_wrong_is_named_and_the_whole_chunks_before_it_come(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", ROWS))
    lines = path.read_text().splitlines()
    lines[70] = "{not json"
    path.write_text("\n".join(lines))
    stream = PreparedStream(RowStream(str(path)), TOKENIZER, Options(64))
    came = []
    with stream.chunks() as chunks, pytest.raises(DataError, match="line 71 of"):
        came.extend(chunk.number for chunk in chunks)
    assert came == [0, 1, 2]


def test_tools_that_come_late_are_read_and_other_late_columns_are_listed() -> None:
    """INV-33: nothing that a model would see is left out because the first rows lack it."""
    late = {"tools": json.dumps([{"type": "function", "function": {"name": "search"}}]), "source": "web"}
    rows = [*TALKS[:30], *({**row, **late} for row in TALKS[30:])]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools | length }} tools{% endif %}" + str(tokenizer.chat_template)
    whole = prepare(rows, tokenizer, max_length=512)
    stream = PreparedStream(RowStream(rows), tokenizer, Options(512))
    totals = stream.totals()
    with stream.chunks() as chunks:
        ids = []
        for chunk in chunks:
            totals.add(chunk.batch, stream.job_of(chunk))
            ids += chunk.table.to_pylist()
    assert ids == whole.dataset.to_list()
    assert stream.report_of(totals).unused_columns == whole.report.unused_columns == ("source",)
    assert len(ids[30]["prompt_ids"]) > len(prepare(TALKS, tokenizer, max_length=512).dataset[30]["prompt_ids"])


@pytest.mark.sweep(1)
@pytest.mark.parametrize("processes", [None, 2])
def test_never_more_than_a_few_chunks_are_ahead_of_what_is_used(processes: int | None) -> None:
    """What is held does not grow with the stream, which has no end here."""
    pulled = 0

    def endless():
        nonlocal pulled
        while True:
            pulled += 1
            yield ROWS[pulled % 40]

    stream = PreparedStream(
        RowStream(IterableDataset.from_generator(endless)), TOKENIZER, Options(64, num_proc=processes)
    )
    pulled, most = 0, 0
    with stream.chunks() as chunks:
        for used, _ in zip(range(1, 40), chunks, strict=False):
            if used % 13 == 0:
                time.sleep(0.3)  # time in which it could run away
            most = max(most, pulled - used * streams.ROWS_PER_CHUNK)
        # Waiting, in the making, and handed to other processes; `datasets` itself reads some rows ahead.
        assert 0 < most <= (5 + 2 * (processes or 0)) * streams.ROWS_PER_CHUNK
    time.sleep(0.3)
    before = pulled
    time.sleep(0.3)
    assert pulled == before
    assert not [one for one in threading.enumerate() if one.name == "tether-prepares-ahead"]


def test_what_is_made_ahead_comes_in_order_and_errors_in_their_place() -> None:
    def items():
        yield from range(5)
        raise ValueError("the sixth")

    came = []
    with Ahead(items, 2) as ahead, pytest.raises(ValueError, match="the sixth"):
        came.extend(ahead)
    assert came == [0, 1, 2, 3, 4]
    with Ahead(lambda: iter(range(10**9)), 1) as ahead:
        assert [next(ahead), next(ahead)] == [0, 1]
    assert list(ahead) == []


def test_images_come_with_their_rows() -> None:
    """INV-34: pixels and ids, with chunks that have none, and rows without any among others."""
    processor = tiny_processor("llava")
    counts = [1, 2, 0, 1, 1, 0, 2, 1, 1, 1] + [0] * 10 + [1, 0, 1, 2, 1]
    rows = [image_row(count, text=f"what is it {i}") for i, count in enumerate(counts)]
    whole = [example_from_row(row) for row in prepare(rows, processor, max_length=None).dataset]
    stream = PreparedStream(RowStream(rows), processor, Options(None))
    with stream.chunks() as chunks:
        found = [example_from_row(row) for chunk in chunks for row in stream.rows_of(chunk.table)]
    assert [one.keys for one in found] == [one.keys for one in whole]
    for one, other, count in zip(found, whole, counts, strict=True):
        assert (one.images is None) == (count == 0)
        assert one.source_row == other.source_row
        if one.images is not None and other.images is not None:
            assert torch.equal(one.images.tensors["pixel_values"], other.images.tensors["pixel_values"])
    late = [*TALKS[:20], {**image_row(1), "images": [{"bytes": b"no image", "path": None}]}]
    stream = PreparedStream(RowStream(late), processor, Options(None))
    with stream.chunks() as chunks, pytest.raises(DataError, match="row 21: its images cannot be read"):
        list(chunks)


def test_a_model_with_an_encoder_gets_its_ids() -> None:
    tokenizer = tiny_seq2seq_tokenizer("t5")
    whole = prepare(ROWS, tokenizer, max_length=64, encoder_decoder=True)
    stream = PreparedStream(RowStream(ROWS), tokenizer, Options(64, encoder_decoder=True))
    with stream.chunks() as chunks:
        assert [row for chunk in chunks for row in chunk.table.to_pylist()] == whole.dataset.to_list()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_that_prepare_do_not_outlive_a_run_that_was_killed(tmp_path: Path) -> None:
    """They wait for work for as long as they live; no one else would end them."""
    path = write(tmp_path / "a.jsonl", ROWS)
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from tiny import tiny_tokenizer\n"
        "from tether.data.prepare.job import Options\n"
        "from tether.data.prepare.stream import PreparedStream\n"
        "from tether.data.sources.stream import RowStream\n"
        "stream = PreparedStream(RowStream(sys.argv[1]), tiny_tokenizer(), Options(64, num_proc=2))\n"
        "print(*stream._pool._processes, flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, path, str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        workers = [int(one) for one in run.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(alive, workers))
        run.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def alive(process: int) -> bool:
    """Whether it runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
