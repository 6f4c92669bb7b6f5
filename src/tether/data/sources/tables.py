"""Arrow tables of files, in types that `datasets` has names for. Called by `files`."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
from datasets.features.features import generate_from_arrow_type

from tether.data.rows.columns import EXTRAS, IMAGE_COLUMNS, TEXTS, VALUES
from tether.errors import DataError

_READ = (*TEXTS, *VALUES, *EXTRAS, *IMAGE_COLUMNS, "scores")


def readable(table: pa.Table, where: str) -> pa.Table:
    """A table with columns of odd types (maps, as Spark writes them, UUIDs, views) as plain ones where training reads
    them, and without their values where it does not, so that they are listed; and of columns of one name, the first.

    Raises:
        DataError: a column that training reads is there twice, or has a type that cannot be made plain.
    """
    counts = Counter(table.column_names)
    if repeated := [name for name, count in counts.items() if count > 1 and name in _READ]:
        raise DataError(f"{where} has the column `{repeated[0]}` {counts[repeated[0]]} times. Rename or remove one.")
    columns: dict[str, pa.ChunkedArray | pa.Array] = {}
    for place, name in enumerate(table.column_names):
        if name not in columns:
            columns[name] = _plain(table.column(place), name, where)
    plain = pa.table(columns)
    return plain.replace_schema_metadata(table.schema.metadata)


def _plain(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray | pa.Array:
    try:
        generate_from_arrow_type(column.type)
    except (ValueError, NotImplementedError, TypeError):
        if name not in _READ:
            return pa.nulls(len(column), pa.string())
        try:
            return pa.array(column.to_pylist())
        except pa.ArrowException as error:
            raise DataError(f"{where}: the column `{name}` has the type {column.type}. Write it as text.") from error
    return column
