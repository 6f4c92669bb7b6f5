"""Where rows come from: objects in memory, local files, or the hub. Called by `prepare` and the command line.

Rows are counted from 1 in every message, over all files in the order they were given (a glob is sorted). In JSON lines
without blank lines, row N of a single file is its line N. `Preference.source_row` counts the same rows from 0.
"""

from __future__ import annotations

import csv
import difflib
import glob
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset

from tether.data.columns import EXTRAS, TEXTS
from tether.data.schema import explain_mixed_types
from tether.errors import DataError

Source = Dataset | DatasetDict | str | Path | Sequence[Mapping[str, Any]] | Sequence[str | Path]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FIELD_BYTES = min(sys.maxsize, 2**31 - 1)  # csv's own limit of 128 KiB per field is shorter than a long conversation


def load_rows(source: Source, *, split: str = "train", name: str = "data") -> Dataset:
    """Read rows from wherever they are; every column is kept and nothing is checked but that it can be read.

    Args:
        source: a `datasets.Dataset` or `DatasetDict`; a list of dictionaries, one per row; a path or glob, or a list of
            them, to files ending in .jsonl, .json, .csv or .parquet; or the name of a hub data set, `owner/name`.
        split: which part of a `DatasetDict` or of a hub data set; files have no parts.
        name: what to call these rows in messages.

    Returns:
        The rows in source order.

    Raises:
        DataError: nothing is there, it cannot be read, it has no rows, or its kind is not supported.

    Example:
        >>> load_rows([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}]).column_names
        ['prompt', 'chosen', 'rejected']
    """
    if isinstance(source, Dataset):
        rows = source
    elif isinstance(source, DatasetDict):
        rows = _part(source, split, name)
    elif isinstance(source, (str, Path)):
        rows = _from_text(str(source), split, name)
    elif isinstance(source, Sequence):
        rows = _from_list(source, split, name)
    else:
        kind = "a streamed data set" if isinstance(source, IterableDataset) else f"a {type(source).__name__}"
        raise DataError(
            f"{name}: {kind} came; rows must be a datasets.Dataset, a list of dictionaries, a path or a hub name. "
            "Load a streamed data set without streaming=True."
        )
    if len(rows) == 0:
        shown = f" ({source})" if isinstance(source, (str, Path)) else ""
        raise DataError(f"{name}: there are no rows{shown}; at least one preference pair is needed.")
    return rows


def _part(parts: DatasetDict, split: str, name: str) -> Dataset:
    if split not in parts:
        raise DataError(f"{name}: there is no split `{split}`; there are {_listed(map(str, parts))}. Name one of them.")
    return parts[split]


def _from_list(source: Sequence[Any], split: str, name: str) -> Dataset:
    if all(isinstance(item, Mapping) for item in source):
        return Dataset(_table(cast(Sequence[Mapping[str, Any]], source), name))
    wanted = Mapping if isinstance(source[0], Mapping) else (str, Path)
    for number, item in enumerate(source, 1):
        if not isinstance(item, wanted):
            raise DataError(
                f"{name}: item {number} of the list is of type {type(item).__name__}; a list must hold dictionaries, "
                "one per row, or paths, one per file."
            )
    _refuse_split(split, name)
    return _from_files([path for item in source for path in _expand(str(item), name)], name)


def _from_text(source: str, split: str, name: str) -> Dataset:
    is_hub_name = _HUB_NAME.fullmatch(source) and not Path(source).exists() and Path(source).suffix not in READERS
    if is_hub_name:
        return _from_hub(source, split, name)
    _refuse_split(split, name)
    return _from_files(_expand(source, name), name)


def _refuse_split(split: str, name: str) -> None:
    if split != "train":
        raise DataError(
            f"{name}: split=`{split}` was given with a path, and files have no splits. Give the files of that split, "
            "or leave split out."
        )


def _from_hub(source: str, split: str, name: str) -> Dataset:
    try:
        return cast(Dataset, datasets.load_dataset(source, split=split))
    except Exception as error:  # the hub client raises errors of many libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name}: no file `{source}` was found in {Path.cwd()}, and the hub data set `{source}`, split `{split}`, "
            f"could not be fetched: {reason.rstrip('.')}. Correct the path, or check the name and the connection."
        ) from error


def _expand(source: str, name: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{name}: `{source}` is a folder; name its files, for example `{path / '*.jsonl'}`.")
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


def _from_files(paths: list[Path], name: str) -> Dataset:
    tables = []
    for path in paths:
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(
                f"{name}: `{path}` ends in `{path.suffix}`; it must end in {_listed(READERS)}. Convert or rename it."
            )
        if not path.stat().st_size:
            raise DataError(f"{name}: `{path}` is empty; it must hold at least one row.")
        table = reader(path, name)
        if not table.num_rows:
            raise DataError(f"{name}: `{path}` has no rows; it must hold at least one row.")
        tables.append(table)
    try:
        return Dataset(pa.concat_tables(tables, promote_options="permissive") if len(tables) > 1 else tables[0])
    except pa.ArrowException as error:
        raise DataError(
            f"{name}: the files {_listed(map(str, paths))} give a column of one name different types "
            f"({str(error).splitlines()[0]}). Make them alike, or prepare them apart."
        ) from error


def _read_jsonl(path: Path, name: str) -> pa.Table:
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
    return _table(rows, f"{name} ({path})")


def _read_json(path: Path, name: str) -> pa.Table:
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
    return _table(rows, f"{name} ({path})")


def _read_csv(path: Path, name: str) -> pa.Table:
    before = csv.field_size_limit(_FIELD_BYTES)
    try:
        with _opened(path) as file:
            rows = _csv_rows(csv.reader(_decoded(file, path, name), strict=True), path, name)
    finally:
        csv.field_size_limit(before)
    return _table(rows, f"{name} ({path})")


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


def _read_parquet(path: Path, name: str) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}: `{path}` cannot be read as Parquet ({reason}). Write it again.") from error


READERS: dict[str, Callable[[Path, str], pa.Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _opened(path: Path) -> Any:
    # `newline=""` keeps line breaks inside quoted CSV fields; a byte order mark is no part of the first column's name.
    return path.open(encoding="utf-8-sig", newline="")


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


def _table(rows: Sequence[Mapping[str, Any]], name: str) -> pa.Table:
    """Rows as an Arrow table, a column at a time, so that values of two types in one column can be named."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    arrays: dict[str, Any] = {}
    for column in columns:
        values = [_portable(column, row.get(column)) for row in rows]
        try:
            arrays[column] = pa.array(values)
        except (pa.ArrowException, OverflowError, TypeError) as error:
            if column in TEXTS:
                raise DataError(explain_mixed_types(rows, name, f"`{column}`: {error}")) from error
            # Not read by training, but still listed among the unused columns.
            arrays[column] = pa.array([json.dumps(value, default=str) for value in values])
    return pa.table(arrays)


def _portable(column: str, value: Any) -> Any:
    """What has another shape in every row (tools, arguments of a call) as JSON, which keeps it whole; see `decoded`."""
    if column in EXTRAS:
        return value if value is None or isinstance(value, str) else json.dumps(value, default=str)
    if column in TEXTS and isinstance(value, list):
        return [_portable_message(item) for item in value]
    return value


def _portable_message(item: Any) -> Any:
    if isinstance(item, list):  # one of several completions
        return [_portable_message(message) for message in item]
    if not isinstance(item, dict) or not isinstance(item.get("tool_calls"), list):
        return item
    return {**item, "tool_calls": json.dumps(item["tool_calls"], default=str)}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
