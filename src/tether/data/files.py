"""Files of rows: JSON lines, JSON, CSV (each also compressed), Parquet and Arrow. Called by `sources`."""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tether.errors import DataError

# Rows as they were written, or as a table.
Part = list[dict[str, Any]] | pa.Table
_FIELD_BYTES = min(sys.maxsize, 2**31 - 1)  # csv's own limit of 128 KiB per field is shorter than a long conversation


def expand(source: str, name: str) -> list[Path]:
    """The files that a path, glob or folder stands for, sorted.

    Raises:
        DataError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if found := sorted(item for item in path.rglob("*") if item.is_file() and kind_of_file(item) in READERS):
            return found
        raise DataError(f"{name}: the folder `{source}` has no file ending in {listed(READERS)}. Name another one.")
    if path.exists():
        return [path]
    if found := sorted(glob.glob(str(path), recursive=True)):
        return [Path(item) for item in found]
    if any(mark in source for mark in "*?["):
        raise DataError(f"{name}: no file matches `{source}`, looked for from {Path.cwd()}. Correct the pattern.")
    folder = path.parent
    if not folder.is_dir():
        raise DataError(f"{name}: there is no file `{source}`: the folder {folder.absolute()} does not exist.")
    near = difflib.get_close_matches(path.name, [item.name for item in folder.iterdir()], n=1)
    hint = f" Did you mean `{folder / near[0]}`?" if near else " Correct the path."
    raise DataError(f"{name}: there is no file `{path.name}` in {folder.absolute()}.{hint}")


def _read_jsonl(path: Path, name: str) -> Part:
    rows = []
    with _opened(path) as lines:
        for number, line in enumerate(_decoded(lines, path, name), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{name}: line {number} of `{path}` is not JSON ({error}). Each line must hold one object such as "
                    '{"prompt": "…", "chosen": "…", "rejected": "…"}; correct or remove the line.'
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{name}: line {number} of `{path}` holds a value of type {type(row).__name__}; each line must "
                    "hold one object."
                )
            rows.append(row)
    return rows


def _read_json(path: Path, name: str) -> Part:
    with _opened(path) as file:
        text = "".join(_decoded(file, path, name))
    if not text.lstrip().startswith("["):
        return _read_jsonl(path, name)  # JSON lines under the wrong ending are common
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: `{path}` is not JSON ({error}); it must hold a list of objects.") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{name}: row {number} of `{path}` is of type {type(row).__name__}; every row must be an object."
            )
    return rows


def _read_csv(path: Path, name: str) -> Part:
    before = csv.field_size_limit(_FIELD_BYTES)
    try:
        with _opened(path) as file:
            rows = _csv_rows(csv.reader(_decoded(file, path, name), strict=True), path, name)
    finally:
        csv.field_size_limit(before)
    return rows


def _csv_rows(reader: Any, path: Path, name: str) -> list[dict[str, str]]:
    rows = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{name}: the header of `{path}` names a column twice ({', '.join(header)}). Rename one.")
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{name}: the row ending in line {reader.line_num} of `{path}` has {len(cells)} fields, the header "
                    f"has {len(header)}. Put text that holds commas or line breaks in double quotes."
                )
            if cells:
                rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{name}: line {reader.line_num} of `{path}` is not CSV ({error}). Correct it.") from error
    return rows


def _read_parquet(path: Path, name: str) -> Part:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}: `{path}` cannot be read as Parquet ({reason}). Write it again.") from error


def _read_arrow(path: Path, name: str) -> Part:
    try:
        with pa.memory_map(str(path)) as source:
            try:
                return pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                return pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}: `{path}` cannot be read as Arrow ({reason}). Write it again.") from error


READERS: dict[str, Callable[[Path, str], Part]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
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
    reader = READERS.get(kind_of_file(path))
    if reader is None:
        raise DataError(
            f"{name}: `{path}` ends in `{path.suffix}`; it must end in {listed(READERS)}. Convert or rename it."
        )
    if not path.stat().st_size:
        raise DataError(f"{name}: `{path}` is empty; it must hold at least one row.")
    rows = reader(path, name)
    if not len(rows):
        raise DataError(f"{name}: `{path}` has no rows; it must hold at least one row.")
    return rows


def _opened(path: Path) -> Any:
    # `newline=""` keeps line breaks inside quoted CSV fields; a byte order mark is no part of the first column's name.
    if path.suffix.lower() not in COMPRESSED:
        return path.open(encoding="utf-8-sig", newline="")
    return io.TextIOWrapper(pa.input_stream(str(path), compression="detect"), encoding="utf-8-sig", newline="")


def _decoded(lines: Iterable[str], path: Path, name: str) -> Iterable[str]:
    number = 0
    try:
        for line in lines:
            number += 1
            yield line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: `{path}` is not UTF-8 after line {number} ({error.reason}). Save it as UTF-8."
        ) from error
    except (OSError, EOFError) as error:
        raise DataError(f"{name}: `{path}` cannot be unpacked after line {number} ({error}). Pack it again.") from error


def listed(names: Iterable[str]) -> str:
    """Names in a row, for messages."""
    return ", ".join(f"`{name}`" for name in names)
