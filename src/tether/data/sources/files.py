"""Files of rows: JSON lines, JSON, CSV (each also compressed), Parquet and Arrow. Called by `sources`."""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tether.data.rows.columns import BATCH_ROWS, TEXTS
from tether.data.sources.fetched import STORES, fetched, is_in_store
from tether.data.sources.tables import readable
from tether.errors import DataError

logger = logging.getLogger("tether")
# Rows as they were written, or as a table.
Part = list[dict[str, Any]] | pa.Table
Reader = TypeVar("Reader", bound=Callable[[Path, str], Any])
_FIELD_BYTES = min(sys.maxsize, 2**31 - 1)  # csv's own limit of 128 KiB per field is shorter than a long conversation
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# What `datasets` takes for the name of a part of a data set, and for a file of one in several.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
_SPLITS |= {"evaluation": "test", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLITS |= {"dev": "validation"}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
# Characters of a line of a packed file; and of all of it, beyond so many, as a multiple of its bytes: text of people
# packs to a third or a tenth, a file that is made to fill a disk to a thousandth.
_LINE = 2**28
_UNPACKED, TIMES = 2**28, 200
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which would silently keep the last of two values of one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{twice}` is given twice in one object; keep one of the two")
    return found


# Made once: `json.loads` with a hook makes one for each line, which takes as long as the line does.
_parse = json.JSONDecoder(object_pairs_hook=_once).decode


class UnpacksTooFarError(DataError):
    """A packed file that holds far more than text packs to."""


def expand(source: str, name: str, split: str = "train") -> list[Path]:
    """The files that a path, glob or folder stands for, sorted.

    Args:
        source: what was given.
        name: what to call the rows in messages.
        split: which files of a folder whose files are named after parts of a data set (`train.jsonl`, `test/a.jsonl`,
            `data/train-00000-of-00002.parquet`); a folder of other files has no parts.

    Raises:
        DataError: there is none.
    """
    if _ADDRESS.match(source) and not is_in_store(source):
        raise DataError(
            f"{name}: `{source}` is an address, and of addresses only those of object stores are read ({STORES[0]}://, "
            "gs://, az://). Fetch the file and give its path; a hub data set is read by its name, `owner/name`, with "
            "`data_files` for some of its files."
        )
    path = fetched(source, name) if is_in_store(source) else Path(source).expanduser()
    if path.is_dir():
        return _files_of(path, name, split)
    if path.exists():
        _refuse_split(split, name)
        return [path]
    if found := sorted(glob.glob(str(path), recursive=True)):
        _refuse_split(split, name)
        folders = {item for item in found if Path(item).is_dir()}
        nested = [_files_of(Path(item), name, split) if item in folders else [Path(item)] for item in found]
        return list(dict.fromkeys(file for files in nested for file in files))
    if any(mark in source for mark in "*?["):
        raise DataError(f"{name}: no file matches `{source}`, looked for from {Path.cwd()}. Correct the pattern.")
    folder = path.parent
    if not folder.is_dir():
        raise DataError(f"{name}: there is no file `{source}`: the folder {folder.absolute()} does not exist.")
    near = difflib.get_close_matches(path.name, [item.name for item in folder.iterdir()], n=1)
    hint = f" Did you mean `{folder / near[0]}`?" if near else " Correct the path."
    raise DataError(f"{name}: there is no file `{path.name}` in {folder.absolute()}.{hint}")


def _files_of(folder: Path, name: str, split: str) -> list[Path]:
    """The files of a folder: hidden ones are no data, and of those named after parts of a data set one part."""
    found = sorted(
        item
        for item in folder.rglob("*")
        if item.is_file()
        and kind_of_file(item) in READERS
        and item.name not in _NO_ROWS
        and not any(part.startswith((".", "__")) for part in item.relative_to(folder).parts)
    )
    if not found:
        raise DataError(f"{name}: the folder `{folder}` has no file ending in {listed(READERS)}. Name another one.")
    parts = {item: _split_of(item.relative_to(folder)) for item in found}
    if set(parts.values()) <= {None} or set(parts.values()) == {"train"} == {split}:
        _refuse_split(split, name)
        return found
    chosen = [item for item in found if parts[item] == split]
    if split == "train":  # files that are named after no part are rows to train on, too
        chosen = [item for item in found if parts[item] in ("train", None)]
    there = sorted({part for part in parts.values() if part is not None})
    if not chosen:
        raise DataError(
            f"{name}: the folder `{folder}` has files of the parts {listed(there)}, and none of `{split}`. Set "
            "`split` to one of them, or name the files."
        )
    left = [str(item.relative_to(folder)) for item in found if item not in chosen]
    shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    if left:
        logger.info(f"{name}: of the folder {folder}, the files of `{split}` are read; left out: {shown}")
    return chosen


def _split_of(path: Path) -> str | None:
    """The part of a data set that a file is named after."""
    stem = path.name.split(".")[0]
    if shard := _SHARD.fullmatch(stem):
        return _SPLITS.get(shard[1], shard[1])
    words = (word for part in (stem, *reversed(path.parts[:-1])) for word in re.split(r"[\W_]+", part.lower()))
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _refuse_split(split: str, name: str) -> None:
    if split != "train":
        raise DataError(
            f"{name}: split=`{split}` was given with files that are not named after parts. Give the files of that "
            "split, or leave split out."
        )


def _jsonl_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    with _opened(path) as lines:
        for number, line in enumerate(_decoded(lines, path, name), 1):
            if not line.strip():
                continue
            try:
                row = _parse(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{name}: line {number} of `{path}` cannot be read as JSON ({error}). Each line must hold "
                    'one object such as {"prompt": "…", "chosen": "…", "rejected": "…"}; correct or remove the line.'
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{name}: line {number} of `{path}` holds a value of type {type(row).__name__}; each line must "
                    "hold one object."
                )
            yield row


def _read_jsonl(path: Path, name: str) -> Part:
    return list(_jsonl_rows(path, name))


def _json_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Of JSON lines under the wrong ending; a list cannot be read in parts."""
    with _opened(path) as lines:
        first = next((line for line in _decoded(lines, path, name) if line.strip()), "")
    if first.lstrip().startswith("["):
        raise DataError(
            f"{name}: `{path}` is one JSON list, which cannot be streamed: it must be read whole to be understood. "
            "Write one object a line (.jsonl), or read it without streaming."
        )
    if first.strip() in ("{", ""):
        raise DataError(
            f"{name}: `{path}` is one JSON object over several lines, which cannot be streamed. Write one object a "
            "line (.jsonl), or read it without streaming."
        )
    yield from _jsonl_rows(path, name)


def _read_json(path: Path, name: str) -> Part:
    with _opened(path) as file:
        text = "".join(_decoded(file, path, name))
    if not text.lstrip().startswith("["):
        whole = _one_object(text, path, name)
        # JSON lines under the wrong ending are common
        return _read_jsonl(path, name) if whole is None else _rows_in(whole, path, name)
    try:
        rows = _parse(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: `{path}` cannot be read as JSON ({error}); it must hold a list of objects."
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{name}: row {number} of `{path}` is of type {type(row).__name__}; every row must be an object."
            )
    return rows


def _one_object(text: str, path: Path, name: str) -> dict[str, Any] | None:
    try:
        found = _parse(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    except ValueError as error:
        raise DataError(f"{name}: `{path}` cannot be read as JSON ({error}).") from error
    return found if isinstance(found, dict) else None


def _rows_in(whole: dict[str, Any], path: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a file that is one object: itself, the one list of objects in it (`{"data": [...]}`), or columns."""
    if _has_columns(whole):
        return [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]
    lists = {
        key: value
        for key, value in whole.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    messages = any({"content", "value"} & item.keys() for value in lists.values() for item in value)
    if whole.keys() & set(TEXTS) or messages:
        return [whole]
    if len(lists) == 1:
        return next(iter(lists.values()))
    raise DataError(
        f"{name}: `{path}` is one JSON object with the keys {listed(map(str, whole))}, and "
        f"{'none' if not lists else 'more than one'} of them holds a list of rows. Write the rows as one list, or one "
        "object a line."
    )


def _has_columns(whole: dict[str, Any]) -> bool:
    """Whether each value is a column: lists of one length, of which one that is read as text holds texts."""
    lengths = {len(value) if isinstance(value, list) else -1 for value in whole.values()}
    texts = [value for key, value in whole.items() if key in TEXTS]
    return len(lengths) == 1 and -1 not in lengths and any(isinstance(item, str) for value in texts for item in value)


def _read_csv(path: Path, name: str) -> Part:
    return list(_csv_rows(path, name))


def _csv_rows(path: Path, name: str) -> Iterator[dict[str, str]]:
    before = csv.field_size_limit(_FIELD_BYTES)
    reader: Any = None
    try:
        with _opened(path) as file:
            reader = csv.reader(_decoded(file, path, name), strict=True)
            header = _header(reader, path, name)
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise DataError(
                        f"{name}: the row ending in line {reader.line_num} of `{path}` has {len(cells)} fields, "
                        f"{_of_header(header)}. {_quoting(cells)}"
                    )
                if cells:
                    yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{name}: line {reader.line_num} of `{path}` is not CSV ({error}). Correct it.") from error
    finally:
        csv.field_size_limit(before)


def _header(reader: Any, path: Path, name: str) -> list[str]:
    """The names of the columns: the first line that is not blank. Spreadsheets write columns without a name beside the
    used ones; each gets its number for one."""
    header = next((cells for cells in reader if any(cells)), [])
    header = [one or (f"column {place}" if header.count("") > 1 else "") for place, one in enumerate(header, 1)]
    if len(set(header)) < len(header):
        raise DataError(f"{name}: the header of `{path}` names a column twice ({', '.join(header)}). Rename one.")
    apart = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
    if apart is not None:
        raise DataError(
            f"{name}: the header of `{path}` is one column, `{header[0]}`: its fields are separated by {apart!r}. "
            "Separate them by commas."
        )
    return header


def _of_header(header: list[str]) -> str:
    return (
        f"the header has {len(header)}" if len(header) > 1 else f"and the first line, `{header[0]}`, names one column"
    )


def _quoting(cells: list[str]) -> str:
    """What to do about a row that has more or fewer fields than the header."""
    if any(cell.lstrip() != cell and cell.lstrip().startswith('"') for cell in cells):
        return "A double quote opens a text only right behind a comma: take the blank before it out."
    return "The first line must name the columns; put text that holds commas or line breaks in double quotes."


def _read_parquet(path: Path, name: str) -> Part:
    with _arrow_errors(path, name, "Parquet"):
        return readable(pq.ParquetFile(path).read(), f"{name}: `{path}`")


def _parquet_tables(path: Path, name: str) -> Iterator[pa.Table]:
    with _arrow_errors(path, name, "Parquet"), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS):
            yield readable(pa.Table.from_batches([batch]), f"{name}: `{path}`")


def _read_arrow(path: Path, name: str) -> Part:
    with _arrow_errors(path, name, "Arrow"), _arrow_reader(path) as reader:
        return readable(reader.read_all(), f"{name}: `{path}`")


def _arrow_tables(path: Path, name: str) -> Iterator[pa.Table]:
    with _arrow_errors(path, name, "Arrow"), _arrow_reader(path) as reader:
        count = getattr(reader, "num_record_batches", None)
        batches = iter(reader) if count is None else map(reader.get_batch, range(count))
        for batch in batches:
            yield readable(pa.Table.from_batches([batch]), f"{name}: `{path}`")


@contextmanager
def _arrow_reader(path: Path) -> Iterator[Any]:
    with pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(source)
        yield reader


@contextmanager
def _arrow_errors(path: Path, name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}: `{path}` cannot be read as {what} ({reason}). Write it again.") from error


READERS: dict[str, Callable[[Path, str], Part]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
# The same files a part at a time: a row, or a table of some rows.
_STREAMS: dict[str, Callable[[Path, str], Iterator[dict[str, Any] | pa.Table]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_tables,
    ".arrow": _arrow_tables,
}
# Compressions that Arrow knows by a file's ending; the ending before it says what is inside.
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_TEXT = (".jsonl", ".ndjson", ".json", ".csv")


def kind_of_file(path: Path) -> str:
    """The ending that says what a file holds: `.jsonl` of `pairs.jsonl.gz`."""
    endings = [ending.lower() for ending in path.suffixes]
    if len(endings) > 1 and endings[-1] in COMPRESSED and endings[-2] in _TEXT:
        return endings[-2]
    return endings[-1] if endings else ""


def read_file(path: Path, name: str) -> Part:
    """The rows of one file: plain dictionaries where it is text, else a table.

    Raises:
        DataError: its kind is not known, it cannot be read, or it has no rows.
    """
    rows = _of_kind(READERS, path, name)(path, name)
    if not len(rows):
        raise DataError(_no_rows(path, name))
    return rows


def stream_file(path: Path, name: str) -> Iterator[dict[str, Any] | pa.Table]:
    """The rows of one file, one after another where it is text, else tables of some rows; never all at once.

    Raises:
        DataError: see `read_file`; or it is a JSON list, which can only be read whole.
    """
    empty = True
    for part in _of_kind(_STREAMS, path, name)(path, name):
        empty = False
        yield part
    if empty:
        raise DataError(_no_rows(path, name))


def _of_kind(readers: Mapping[str, Reader], path: Path, name: str) -> Reader:
    """What reads a file of this kind, which must hold something."""
    reader = readers.get(kind_of_file(path))
    if reader is None:
        raise DataError(f"{name}: `{path}` ends in `{path.suffix}`; it must end in {listed(READERS)}. {_advice(path)}")
    if not path.stat().st_size:
        raise DataError(f"{name}: `{path}` is empty; it must hold at least one row.")
    return reader


def _advice(path: Path) -> str:
    """What to do with a file of an ending that nothing reads; another name makes no other file of it."""
    if path.suffix.lower() in (".zip", ".tar", ".tgz", ".7z", ".xz", *COMPRESSED):
        return f"Unpack it; packed files are read where they are text and end in one of {listed(COMPRESSED)}."
    return "Write its rows as one of these; rename it only if its content is that already."


def _no_rows(path: Path, name: str) -> str:
    return f"{name}: `{path}` has no rows; it must hold at least one row."


def _opened(path: Path) -> Any:
    # `newline=""` keeps line breaks inside quoted CSV fields; a byte order mark is not part of the first column's name.
    if path.suffix.lower() not in COMPRESSED:
        return path.open(encoding="utf-8-sig", newline="")
    return io.TextIOWrapper(pa.input_stream(str(path), compression="detect"), encoding="utf-8-sig", newline="")


def _decoded(lines: Any, path: Path, name: str) -> Iterable[str]:
    """Line by line; of a packed file, which may unpack to any number of bytes, none that is longer than a row is, and
    not more in sum than text packs to so small a file."""
    packed = path.suffix.lower() in COMPRESSED
    number, most, left = 0, _LINE if packed else -1, max(_UNPACKED, TIMES * path.stat().st_size)
    try:
        while line := lines.readline(most):
            number += 1
            if len(line) == most:
                raise DataError(
                    f"{name}: line {number} of `{path}` unpacks to more than {_LINE:,} characters, which is not a row. "
                    "Check where the file is from; write one object a line (.jsonl)."
                )
            if packed and (left := left - len(line)) < 0:
                raise UnpacksTooFarError(
                    f"{name}: `{path}` has {path.stat().st_size:,} bytes and unpacks to more than {TIMES} times as "
                    f"many characters, at line {number}, as files do that are made to fill a disk. If it is yours, "
                    "unpack it and name what comes out."
                )
            yield line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: `{path}` is not UTF-8 in line {number + 1} or soon after ({error.reason}). Save it as UTF-8."
        ) from error
    except (OSError, EOFError) as error:
        raise DataError(f"{name}: `{path}` cannot be unpacked after line {number} ({error}). Pack it again.") from error


def listed(names: Iterable[str]) -> str:
    """Names in a row, for messages."""
    return ", ".join(f"`{name}`" for name in names)
