"""Where rows come from: objects in memory, local files, the hub, or several of them. Called by `prepare`.

Rows are counted from 1 in every message, over all files in the order they were given (a glob is sorted). In JSON lines
without blank lines, row N of a single file is its line N. `Preference.source_row` counts the same rows from 0.
"""

from __future__ import annotations

import difflib
import io
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from tether.data.images.lifted import lifted, may_hold_images
from tether.data.images.parts import references_of
from tether.data.rows.columns import BATCH_ROWS, EXTRAS, IMAGE_COLUMNS, KINDS, TEXTS, kind_of
from tether.data.rows.conversion import convert, detected, fitting, reads
from tether.data.rows.formats import Format
from tether.data.rows.schema import explain_mixed_types
from tether.data.rows.values import joined_parts
from tether.data.sources.files import (
    COMPRESSED,
    READERS,
    TIMES,
    Part,
    UnpacksTooFarError,
    expand,
    kind_of_file,
    listed,
    read_file,
    stream_file,
)
from tether.data.sources.functions import transform_of
from tether.data.sources.origin import Origin, Source, by_fractions, is_origin, names_of, origins_of
from tether.data.sources.slices import shares_of, slices_of
from tether.data.sources.tables import Fields, TooManyFieldsError
from tether.data.spool import spooled
from tether.errors import ConfigError, DataError
from tether.types import Kind

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FRACTION_BITS = 1 << 32
_FEATURES = b"huggingface"  # where `datasets` keeps what it knows of columns beyond their types
# Bytes from which on files of these kinds become a table in pieces of so many rows.
_LARGE, _PIECE = 2**24, 10_000
_IN_PIECES = {".jsonl", ".ndjson", ".csv", ".parquet"}


def load_rows(source: Source, *, kind: Kind = "pair", split: str = "train", name: str = "data") -> Dataset:
    """Read rows from wherever they are; nothing is checked but that they can be read and have their format's fields.

    Args:
        source: a `datasets.Dataset` or `DatasetDict`, or a streamed one, which is read whole; a list of dictionaries,
            one per row; a path, glob or folder, or a list of them, of files ending in .jsonl, .json, .csv (all three
            also .gz, .bz2, .zst), .parquet or .arrow, here or in an object store (`s3://bucket/rows/*.parquet`); the
            name of a hub data set, `owner/name`; or a mapping as `Origin` describes, or a list of these.
        kind: what the rows are to be read as; a format has other columns for each.
        split: which part of a `DatasetDict` or of a hub data set; files have no parts.
        name: what to call these rows in messages.

    Returns:
        The rows in source order, with TRL's columns where a format was named or recognised, else with all of their own.

    Raises:
        ConfigError: a mapping has keys or values that are not allowed.
        DataError: nothing is there, it cannot be read, it has no rows, or its kind is not supported.

    Example:
        >>> load_rows([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}]).column_names
        ['prompt', 'chosen', 'rejected']
    """
    origins = origins_of(source, split, name)
    said, mixed = names_of(origins), by_fractions(origins, name)
    several = len(origins) > 1
    parts = [
        _load(origin, kind, f"{name} ({own})" if several else name) for origin, own in zip(origins, said, strict=True)
    ]
    if mixed:
        shares, again = [origin.fraction or 0.0 for origin in origins], origins[0].repeat
        counts = shares_of(list(map(len, parts)), shares, again)
        parts = [
            part.select([place % len(part) for place in range(count)] if again else range(count))
            for part, count in zip(parts, counts, strict=True)
        ]
    rows = parts[0] if len(parts) == 1 else _joined(parts, said, name)
    if len(rows) == 0:
        shown = f" ({source})" if isinstance(source, (str, Path)) else ""
        raise DataError(f"{name}: there are no rows{shown}; at least one preference pair is needed.")
    return rows


def load_of_kind(source: Source, *, name: str = "data") -> tuple[Dataset, Kind]:
    """Rows as `load_rows` gives them, as the kind that their own columns speak for; see there.

    Example:
        >>> load_of_kind([{"prompt": "2 + 2 =", "completion": " 4"}])[1]
        'completion'
    """
    origin = origins_of(source, "train", name)[0]
    layout = origin.layout(name)
    rows = as_said(_sliced(origin, name), origin, name)
    columns = (
        rows.column_names if isinstance(rows, Dataset) else list(dict.fromkeys(key for row in rows for key in row))
    )
    kind = kind_of(columns) if layout is None else None
    if kind is None or (kind == "prompt_only" and layout is None):
        sample = list(islice(plain_rows(rows), 1))
        formats = {one: layout or (None if origin.format else detected(columns, one)) for one in KINDS}
        read = [one for one in KINDS if (own := formats[one]) is not None and reads(own, sample, one)]
        fits = (one for one in KINDS if sample and fitting(sample[0], one) is not None)
        # One answer of two is a pair whose other column has another name, and not a prompt alone.
        spelt = {str(column).strip().lower() for column in columns}
        half: Kind | None = "pair" if {"chosen", "rejected"} & spelt else None
        kind = cast(Kind, read[0] if read else half or kind or next(fits, "pair"))
    if is_origin(source) or len(origins_of(source, "train", name)) == 1:
        return _with_layout(rows, origin, layout, kind, name), kind
    return load_rows(source, kind=kind, name=name), kind


def _load(origin: Origin, kind: Kind, name: str) -> Dataset:
    layout = origin.layout(name)
    return _with_layout(as_said(_sliced(origin, name), origin, name), origin, layout, kind, name)


def _sliced(origin: Origin, name: str) -> Dataset | list[dict[str, Any]]:
    """The rows of the parts that a source names, within their bounds, and of these the first ones where it says so."""
    found: list[Dataset | list[dict[str, Any]]] = []
    for piece in slices_of(origin.split, name):
        rows = _read(origin.path, piece.part, name, origin.hub)
        found.append(rows if piece.whole else _chosen(rows, piece.places(len(rows))))
    if "[" in origin.split and not any(map(len, found)):
        raise DataError(f"{name}: split is `{origin.split}`, and no row lies within its bounds. Widen them.")
    rows = found[0] if len(found) == 1 else _all_of(found, [f"{origin.path}"] * len(found), name)
    rows = rows if origin.first is None else _chosen(rows, range(min(origin.first, len(rows))))
    return transformed(rows, origin, name)


def transformed(rows: Dataset | list[dict[str, Any]], origin: Origin, name: str) -> Dataset | list[dict[str, Any]]:
    """Rows as the function that a source names makes them."""
    if origin.transform is None:
        return rows
    return list(map(transform_of(origin.transform, name), plain_rows(rows)))


def _chosen(rows: Dataset | list[dict[str, Any]], places: range) -> Dataset | list[dict[str, Any]]:
    return rows[places.start : places.stop] if isinstance(rows, list) else rows.select(places)


def _with_layout(
    rows: Dataset | list[dict[str, Any]], origin: Origin, layout: Format | None, kind: Kind, name: str
) -> Dataset:
    if may_hold_images(rows):
        rows = _made_in_pieces(rows, partial(lifted, name=name), name)
    if layout is None and origin.format is None:
        columns = rows.column_names if isinstance(rows, Dataset) else dict.fromkeys(key for row in rows for key in row)
        layout = detected(columns, kind)
    if layout is not None:
        rows = _made_in_pieces(rows, partial(convert, layout=layout, kind=kind, name=name), name)
    table = rows if isinstance(rows, Dataset) else Dataset(table_of(rows, name))
    return table if origin.weight == 1 else table.select(occurrences(len(table), origin.weight))


def _made_in_pieces(
    rows: Dataset | list[dict[str, Any]], made: Callable[..., list[dict[str, Any]]], name: str
) -> Dataset | list[dict[str, Any]]:
    """Rows as `made` makes them of some rows, given the number of the first; many rows in a table some at a time, where
    that makes tables that go together."""

    def tables() -> Iterator[pa.Table]:
        plain = plain_rows(rows)
        for first in range(0, len(rows), _PIECE):
            yield table_of(made(islice(plain, _PIECE), first=first), name, first)

    if isinstance(rows, Dataset) and len(rows) > _PIECE:
        try:
            return cast(Dataset, _dataset(spooled(tables())))
        except (DataError, pa.ArrowException):
            pass  # at once, which says what is wrong with all of them, or finds types that fit them all
    return made(plain_rows(rows))


def _dataset(table: pa.Table | None) -> Dataset | None:
    # Without a fingerprint, the library takes a copy of the whole table for one.
    return None if table is None else Dataset(table, fingerprint=uuid.uuid4().hex)


def plain_rows(rows: Dataset | list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    if isinstance(rows, list):
        yield from rows
        return
    images = [column for column in IMAGE_COLUMNS if column in rows.column_names]
    plain = rows.remove_columns(images).with_format(None)
    for start in range(0, len(plain), BATCH_ROWS):
        batch = cast(dict[str, list[Any]], plain[start : start + BATCH_ROWS])
        for column in images:  # as files, not as pixels
            batch[column] = list(references_of(rows, column, start, start + BATCH_ROWS))
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def as_said(rows: Dataset | list[dict[str, Any]], origin: Origin, name: str) -> Dataset | list[dict[str, Any]]:
    """Rows with the columns, the roles and the keys of messages that their source says."""
    if origin.columns is not None:
        kept = [*origin.columns, *(column for column in origin.fields.values() if column not in origin.columns)]
        found = rows.column_names if isinstance(rows, Dataset) else {key for row in rows for key in row}
        if lacking := [column for column in kept if column not in found]:
            raise DataError(f"{name}: columns has `{lacking[0]}`; there are {listed(map(str, sorted(found)))}.")
        rows = (
            rows.select_columns(kept)
            if isinstance(rows, Dataset)
            else [{key: row[key] for key in kept if key in row} for row in rows]
        )
    rows = renamed(rows, origin.fields, name)
    if not origin.roles and not origin.message_keys:
        return rows
    keys = {theirs: ours for ours, theirs in origin.message_keys.items()}
    return [{key: _relabelled(value, origin.roles, keys) for key, value in row.items()} for row in plain_rows(rows)]


def _relabelled(value: Any, roles: Mapping[str, str], keys: Mapping[str, str]) -> Any:
    """Messages with the usual names of roles and keys; anything else as it is."""
    if isinstance(value, list):
        return [_relabelled(item, roles, keys) for item in value]
    if not isinstance(value, dict):
        return value
    found = {keys.get(key, key): item for key, item in value.items()}
    for key in ("role", "from"):
        if isinstance(found.get(key), str):
            found[key] = roles.get(found[key], found[key])
    return found


def renamed(
    rows: Dataset | list[dict[str, Any]], names: Mapping[str, str], name: str
) -> Dataset | list[dict[str, Any]]:
    """Rows whose columns have the names that the format reads."""
    if not names:
        return rows
    found = rows.column_names if isinstance(rows, Dataset) else list(dict.fromkeys(key for row in rows for key in row))
    for wanted, column in names.items():
        other = next(one for one, its in names.items() if its == column)
        if other != wanted:
            raise ConfigError(
                f"{name}: fields say that both `{other}` and `{wanted}` are in the column `{column}`. Give each its "
                "own."
            )
        if column not in found:
            near = difflib.get_close_matches(column, map(str, found), n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise DataError(
                f"{name}: fields say that `{wanted}` is in the column `{column}`, and there is none. Columns found: "
                f"{', '.join(map(str, found)) or 'none'}.{hint}"
            )
    new = {column: wanted for wanted, column in names.items()}
    if isinstance(rows, list):
        return [
            {new.get(key, key): value for key, value in row.items() if key in new or key not in names} for row in rows
        ]
    hidden = [column for column in names if column in found and column not in new]
    return rows.remove_columns(hidden).rename_columns({old: wanted for old, wanted in new.items() if old != wanted})


def occurrences(count: int, weight: float, first: int = 0) -> list[int]:
    """The place of every row, as often as its weight says; which ones occur once more depends on their place alone.

    Args:
        count: rows.
        weight: of their source.
        first: place of the first of them in it.
    """
    whole, part = divmod(weight, 1)
    more = round(part * _FRACTION_BITS)
    # Knuth's multiplicative hash spreads places evenly, so that 0.5 takes every second row, more or less.
    return [
        place
        for place in range(count)
        for _ in range(int(whole) + ((first + place) * 2654435761 % _FRACTION_BITS < more))
    ]


def _read(source: Any, split: str, name: str, hub: Mapping[str, Any] | None = None) -> Dataset | list[dict[str, Any]]:
    if isinstance(source, (str, Path)):
        return _from_text(str(source), split, name, hub or {})
    refuse_hub_keys(hub or {}, name)
    if isinstance(source, Dataset):
        if source.format["type"] == "custom":
            raise DataError(
                f"{name}: the rows have a transform (set_transform or with_transform), which is applied when they are "
                "looked at and may give others each time. Apply it with rows.map(...) on rows without it "
                "(rows.reset_format()), and give the result."
            )
        return source
    if isinstance(source, (DatasetDict, IterableDatasetDict)):
        return _read(part_of(source, split, name), split, name)
    if isinstance(source, IterableDataset):
        return list(streamed_rows(source))
    if isinstance(source, Sequence):
        return _from_list(source, split, name)
    raise DataError(
        f"{name}: got a {type(source).__name__}; rows must be a datasets.Dataset or IterableDataset, a list of "
        "dictionaries, a path or a hub name."
    )


def streamed_rows(source: IterableDataset) -> Iterator[dict[str, Any]]:
    """The rows of a streamed data set, one after another; images stay the files that they are."""
    plain = source.with_format(None)
    return iter(plain.decode(False) if plain.features else plain)


def part_of(parts: Mapping[Any, Any], split: str, name: str) -> Any:
    if split not in parts:
        raise DataError(f"{name}: there is no split `{split}`; there are {listed(map(str, parts))}. Name one of them.")
    return parts[split]


def _from_list(source: Sequence[Any], split: str, name: str) -> Dataset | list[dict[str, Any]]:
    if all(isinstance(item, Mapping) for item in source):
        return [dict(row) for row in source]
    wanted = Mapping if isinstance(source[0], Mapping) else (str, Path)
    for number, item in enumerate(source, 1):
        if not isinstance(item, wanted):
            raise DataError(
                f"{name}: item {number} of the list is of type {type(item).__name__}; a list must hold dictionaries, "
                "one per row, or paths, one per file."
            )
    paths = list(map(str, source))
    if not any(map(is_saved, paths)):
        return _from_files([path for item in paths for path in expand(item, name, split)], name)
    parts = [_from_text(item, split, name, {}) for item in paths]
    return parts[0] if len(parts) == 1 else _all_of(parts, paths, name)


def _all_of(parts: Sequence[Dataset | list[dict[str, Any]]], names: list[str], name: str) -> Dataset | list[dict]:
    """The rows of several parts, as rows where all of them are, else as a table."""
    if all(isinstance(part, list) for part in parts):
        return [row for part in parts for row in cast(list[dict[str, Any]], part)]
    whole = [part if isinstance(part, Dataset) else Dataset(table_of(part, name, final=False)) for part in parts]
    return _joined(whole, names, name)


def _from_text(source: str, split: str, name: str, hub: Mapping[str, Any]) -> Dataset | list[dict[str, Any]]:
    if is_hub_name(source):
        return from_hub(source, split, name, **hub)
    refuse_hub_keys(hub, name)
    if is_saved(source):
        return from_saved(source, split, name)
    return _from_files(expand(source, name, split), name)


def is_hub_name(source: str) -> bool:
    """Whether a text names a hub data set: `owner/name`, and no file or folder here."""
    path = Path(source).expanduser()
    return bool(_HUB_NAME.fullmatch(source)) and not path.exists() and kind_of_file(path) not in READERS


def is_saved(source: str) -> bool:
    """Whether a text names a folder that `Dataset.save_to_disk` wrote."""
    path = Path(source).expanduser()
    return path.is_dir() and any((path / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json"))


def refuse_hub_keys(hub: Mapping[str, Any], name: str) -> None:
    if hub:
        raise ConfigError(
            f"{name}: `{next(iter(hub))}` is given with rows that are no hub data set. Leave it out, or give the "
            "data set as `owner/name`."
        )


def from_saved(source: str, split: str, name: str) -> Dataset:
    """A folder that `Dataset.save_to_disk` wrote; its rows stay on disk."""
    path = Path(source).expanduser()
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # the reader raises errors of many libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: the folder `{path}` cannot be read as a saved data set ({reason}).") from error
    return part_of(saved, split, name) if isinstance(saved, DatasetDict) else saved


def from_hub(source: str, split: str, rows: str, *, streaming: bool = False, **further: Any) -> Any:
    """A hub data set; with `streaming` an `IterableDataset`. `further` is what `Origin.hub` says of it."""
    further |= {"streaming": True} if streaming else {}
    try:
        return datasets.load_dataset(source, split=split, **further)
    except Exception as error:  # the hub client raises errors of many libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{rows}: no file `{source}` was found in {Path.cwd()}, and the hub data set `{source}`, split `{split}`, "
            f"could not be fetched: {reason.rstrip('.')}. Correct the path, or check the name and the connection."
        ) from error


def _from_files(paths: list[Path], name: str) -> Dataset | list[dict[str, Any]]:
    if (found := _dataset(_in_pieces(paths, name))) is not None:
        return found
    parts: list[tuple[Path, Part]] = [(path, read_file(path, name)) for path in paths]
    if len(parts) == 1:
        rows = parts[0][1]
        return rows if isinstance(rows, list) else Dataset(rows)
    if all(isinstance(rows, list) for _, rows in parts):
        # Each file is made a table on its own first, so that what is wrong with it is said with its name.
        tables = [table_of(cast(list[dict[str, Any]], rows), f"{name} ({path})") for path, rows in parts]
        read = [table.select([column for column in table.column_names if column in TEXTS]) for table in tables]
        concatenated(read, [str(path) for path, _ in parts], name)
        return [row for _, rows in parts for row in cast(list[dict[str, Any]], rows)]
    tables = [
        table_of(rows, f"{name} ({path})", final=False) if isinstance(rows, list) else rows for path, rows in parts
    ]
    return Dataset(concatenated(tables, [str(path) for path, _ in parts], name))


def _in_pieces(paths: list[Path], name: str) -> pa.Table | None:
    """Large files as a table on disk, made of some rows at a time: as Python's objects it is six times as large.

    None for files that can only be read whole, and where pieces have columns of other types than the whole would have:
    they are read whole then, with the messages that belong to that.
    """
    sizes = [path.stat().st_size * (TIMES if path.suffix.lower() in COMPRESSED else 1) for path in paths]
    if not {kind_of_file(path) for path in paths} <= _IN_PIECES or sum(sizes) < _LARGE:
        return None
    try:
        return spooled(table for path in paths for table in _pieces(path, name))
    except (UnpacksTooFarError, TooManyFieldsError):
        raise
    except (DataError, pa.ArrowException):
        return None


def _pieces(path: Path, name: str) -> Iterator[pa.Table]:
    first = 0
    rows = stream_file(path, name)
    for part in rows:
        if isinstance(part, pa.Table):
            yield part
            continue
        piece = [part, *cast(Iterator[dict[str, Any]], islice(rows, _PIECE - 1))]
        yield table_of(piece, name, first, final=False)
        first += len(piece)


def _joined(parts: list[Dataset], names: list[str], name: str) -> Dataset:
    # Rows that were drawn or shuffled are an index over a table; here they become the table.
    tables = [part.with_format("arrow")[:] for part in parts]
    return Dataset(concatenated(cast(list[pa.Table], tables), names, name))


def concatenated(tables: list[pa.Table], names: list[str], name: str) -> pa.Table:
    try:
        joined = pa.concat_tables([table.replace_schema_metadata() for table in tables], promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(
            f"{name}: the files {listed(names)} give a column of one name different types "
            f"({str(error).splitlines()[0]}). Make them alike, or prepare them apart."
        ) from error
    said = {(table.schema.metadata or {}).get(_FEATURES) for table in tables}
    # Such as the names of classes; only where it is said of the columns that came out.
    same = len(said) == 1 and None not in said and all(table.schema.equals(joined.schema) for table in tables)
    return joined.replace_schema_metadata({_FEATURES: said.pop()}) if same else joined


def table_of(rows: Sequence[Mapping[str, Any]], name: str, first: int = 0, *, final: bool = True) -> pa.Table:
    """Rows, the first of which has the number `first`, as an Arrow table.

    It is made a column at a time, so that values of two types in one column can be named. Where columns have their
    `final` names, one of several types that no name says to read becomes JSON; else it may be read under another name.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    arrays: dict[str, Any] = {}
    fields = Fields(name)
    fields.add_columns(len(columns))
    for column in columns:
        values = [_portable(column, row.get(column)) for row in rows]
        try:
            fields.add_values(column, values)
            arrays[str(column)] = _array(column, values)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            if column in TEXTS:
                raise DataError(explain_mixed_types(rows, name, column, error, first)) from error
            if not final:
                raise DataError(
                    f"{name}: the column `{column}` has values of several types ({error}). Give them one type."
                ) from error
            # Not read by training, but still listed among the unused columns.
            arrays[str(column)] = pa.array([json.dumps(value, default=str) for value in values])
    return pa.table(arrays)


def _array(column: str, values: list[Any]) -> pa.Array:
    """Values as a column; content that is text in one message and in parts in another is text in both, or in parts
    where one of these is an image."""
    try:
        return pa.array(values)
    except pa.ArrowException:
        if column not in TEXTS:
            raise
        same = _message_in_parts if any(map(_has_image, values)) else _flat_message
        return pa.array([same(value) for value in values])


def _has_image(item: Any) -> bool:
    if isinstance(item, list):
        return any(map(_has_image, item))
    return isinstance(item, dict) and (item.get("type") == "image" or _has_image(item.get("content")))


def _message_in_parts(item: Any) -> Any:
    if isinstance(item, list):
        return [_message_in_parts(message) for message in item]
    if isinstance(item, dict) and isinstance(item.get("content"), str):
        return {**item, "content": [{"type": "text", "text": item["content"]}]}
    return item


def _flat_message(item: Any) -> Any:
    if isinstance(item, list):
        return [_flat_message(message) for message in item]
    if isinstance(item, dict) and isinstance(item.get("content"), list):
        return {**item, "content": joined_parts(item["content"])}
    return item


def _portable(column: str, value: Any) -> Any:
    """What has another shape in every row (tools, arguments of a call) as JSON, which keeps it whole; see `decoded`."""
    if column in EXTRAS:
        return value if value is None or isinstance(value, str) else json.dumps(value, default=str)
    if column in IMAGE_COLUMNS:
        return _portable_image(value)
    if column in TEXTS and isinstance(value, list):
        return [_portable_message(item) for item in value]
    return value


def _portable_image(value: Any) -> Any:
    """Images in memory as the files that they would be, so that they fit a table; others as they are."""
    if isinstance(value, (list, tuple)):
        return [_portable_image(item) for item in value]
    if not hasattr(value, "save"):
        return value
    file = io.BytesIO()
    value.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def _portable_message(item: Any) -> Any:
    if isinstance(item, list):  # one of several completions
        return [_portable_message(message) for message in item]
    if not isinstance(item, dict) or not isinstance(item.get("tool_calls"), list):
        return item
    return {**item, "tool_calls": json.dumps(item["tool_calls"], default=str)}
