"""Rows that are read in parts, from the start as often as they are asked for, and are never all in memory. Called by
`stream`.

What the parts are together is what `load_rows` returns: the same rows in the same order, with the same columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from tether.compat.datasets import arrow_table
from tether.data.images.lifted import lifted, may_hold_images
from tether.data.rows.columns import BATCH_ROWS
from tether.data.rows.conversion import convert, detected
from tether.data.sources.files import expand, stream_file
from tether.data.sources.load import (
    as_said,
    concatenated,
    from_hub,
    from_saved,
    is_hub_name,
    is_saved,
    occurrences,
    part_of,
    plain_rows,
    refuse_hub_keys,
    streamed_rows,
    table_of,
    transformed,
)
from tether.data.sources.origin import Origin, Source, by_fractions, names_of, origins_of
from tether.data.sources.slices import Slice, slices_of
from tether.errors import ConfigError, DataError
from tether.types import Kind

Part = Any  # a dictionary, for one row, or a `pa.Table`


@dataclass(frozen=True)
class RowStream:
    """Rows in chunks of `BATCH_ROWS`.

    Args:
        source: see `load_rows`; a JSON list cannot be read in parts.
        kind: what the rows are to be read as.
        name: what to call them in messages.

    Example:
        >>> stream = RowStream([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}] * 1500)
        >>> [len(chunk) for chunk in stream.chunks()]
        [1000, 500]
    """

    source: Source
    kind: Kind = "pair"
    name: str = "train"

    def chunks(self, epoch: int = 0) -> Iterator[Dataset]:
        """All rows from the first on; each chunk but the last has `BATCH_ROWS`.

        Args:
            epoch: of a streamed data set that was shuffled: says in which order its rows come.

        Raises:
            ConfigError: see `load_rows`.
            DataError: see `load_rows`; where a row cannot be read, those before it have come.
        """
        origins = origins_of(self.source, "train", self.name)
        names = names_of(origins)
        if by_fractions(origins, self.name):
            raise ConfigError(
                f"{self.name}: fraction needs the number of rows of every source, which a stream does not know. Give "
                "`weight`, or turn data.streaming off."
            )
        several = len(origins) > 1
        waiting: list[pa.Table] = []
        for origin, said in zip(origins, names, strict=True):
            for table in self._tables(origin, f"{self.name} ({said})" if several else self.name, epoch):
                waiting.append(table)
                while sum(map(len, waiting)) >= BATCH_ROWS:
                    whole = concatenated(waiting, names, self.name)
                    yield Dataset(whole.slice(0, BATCH_ROWS).combine_chunks())
                    waiting = [whole.slice(BATCH_ROWS)] if len(whole) > BATCH_ROWS else []
        if waiting:
            yield Dataset(concatenated(waiting, names, self.name).combine_chunks())

    def _tables(self, origin: Origin, name: str, epoch: int) -> Iterator[pa.Table]:
        """The rows of one source with their format's columns, as often as its weight says."""
        layout, first = origin.layout(name), 0
        pieces = slices_of(origin.split, name)
        parts = chain.from_iterable(_within(_parts(origin, one.part, name, epoch), one, name) for one in pieces)
        for part in _batches(parts):
            if origin.first is not None:
                if first >= origin.first:
                    return
                part = part[: origin.first - first]
            count = len(part)
            rows = as_said(transformed(part if isinstance(part, list) else Dataset(part), origin, name), origin, name)
            if first == 0 and layout is None and origin.format is None:
                columns = rows.column_names if isinstance(rows, Dataset) else {key for row in rows for key in row}
                layout = detected(columns, self.kind)
            if may_hold_images(rows):
                rows = lifted(plain_rows(rows), name, first)
            if layout is not None:
                rows = convert(plain_rows(rows), layout, self.kind, name=name, first=first)
            table = table_of(rows, name, first) if isinstance(rows, list) else arrow_table(rows)
            if origin.weight != 1:
                table = table.take(occurrences(count, origin.weight, first))
            first += count
            yield table


def _batches(parts: Iterator[Part]) -> Iterator[list[dict[str, Any]] | pa.Table]:
    """At most `BATCH_ROWS` rows at a time: rows that come alone are put together, large tables are cut."""
    for part in parts:
        if isinstance(part, pa.Table):
            for start in range(0, len(part), BATCH_ROWS):
                yield part.slice(start, BATCH_ROWS)
            continue
        rows, table = [part], None
        for further in islice(parts, BATCH_ROWS - 1):
            if isinstance(further, pa.Table):
                table = further
                break
            rows.append(further)
        yield rows
        if table is not None:
            yield from _batches(iter([table]))


def _within(parts: Iterator[Part], piece: Slice, name: str) -> Iterator[Part]:
    """What lies within the bounds of a slice."""
    if piece.whole:
        yield from parts
        return
    if piece.fixed is None:
        raise ConfigError(
            f"{name}: [{piece.first}:{piece.last}] needs the number of rows, which a stream does not know. Give "
            "numbers from the first row on, as in train[:1000], or turn data.streaming off."
        )
    (start, stop), place = piece.fixed, 0
    for part in parts:
        count = len(part) if isinstance(part, pa.Table) else 1
        first, last = max(start - place, 0), count if stop is None else min(stop - place, count)
        if first < last:
            yield part.slice(first, last - first) if isinstance(part, pa.Table) else part
        place += count
        if stop is not None and place >= stop:
            return


def _parts(origin: Origin, split: str, name: str, epoch: int) -> Iterator[Part]:
    """What a part of a source gives, one after another."""
    source: Any = origin.path
    if not isinstance(source, (str, Path)):
        refuse_hub_keys(origin.hub, name)
    if isinstance(source, (DatasetDict, IterableDatasetDict)):
        source = part_of(source, split, name)
    if isinstance(source, (str, Path)):
        if is_hub_name(str(source)):
            source = from_hub(str(source), split, name, streaming=True, **origin.hub)
        else:
            refuse_hub_keys(origin.hub, name)
            source = from_saved(str(source), split, name) if is_saved(str(source)) else [source]
    if isinstance(source, IterableDataset):
        source.set_epoch(epoch)
        return streamed_rows(source)
    if isinstance(source, Dataset):
        return _tables_of(source)
    if isinstance(source, Sequence) and all(isinstance(item, Mapping) for item in source):
        return (dict(row) for row in source)
    if isinstance(source, Sequence) and all(isinstance(item, (str, Path)) for item in source):
        return chain.from_iterable(_parts_of_path(str(item), split, name) for item in source)
    raise DataError(
        f"{name}: got a {type(source).__name__}; streamed rows must be a datasets.IterableDataset or Dataset, a list "
        "of dictionaries or of paths, a path or a hub name."
    )


def _tables_of(rows: Dataset) -> Iterator[pa.Table]:
    plain = rows.with_format("arrow")
    return (cast(pa.Table, plain[start : start + BATCH_ROWS]) for start in range(0, len(plain), BATCH_ROWS))


def _parts_of_path(path: str, split: str, name: str) -> Iterator[Part]:
    """The rows of a path of a list: of files, or of a folder that `Dataset.save_to_disk` wrote."""
    if is_saved(path):
        return _tables_of(from_saved(path, split, name))
    return chain.from_iterable(stream_file(file, name) for file in expand(path, name, split))


def is_streamed(source: Any) -> bool:
    """Whether rows come as a streamed data set, alone or as one of several sources.

    Example:
        >>> rows = Dataset.from_list([{"prompt": "a"}])
        >>> is_streamed({"path": rows}), is_streamed({"path": rows.to_iterable_dataset()})
        (False, True)
    """
    if isinstance(source, (IterableDataset, IterableDatasetDict)):
        return True
    if isinstance(source, Mapping) and "path" in source:
        return is_streamed(source["path"])
    return isinstance(source, (list, tuple)) and any(map(is_streamed, source))
