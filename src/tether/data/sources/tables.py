"""Arrow tables of files, in types that `datasets` has names for. Called by `files`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
from datasets.features.features import generate_from_arrow_type

from tether.data.rows.columns import EXTRAS, IMAGE_COLUMNS, TEXTS, VALUES
from tether.errors import DataError

_READ = (*TEXTS, *VALUES, *EXTRAS, *IMAGE_COLUMNS, "scores")
# Each field of a table costs its library Python's time at every operation, whatever the number of rows.
MOST_FIELDS = 10_000


class TooManyFieldsError(DataError):
    """Rows with more columns, or keys of objects in them, than can be worked with."""


class Fields:
    """Counts the columns of rows, and the keys of objects in them.

    Args:
        where: what to call the rows.
    """

    def __init__(self, where: str) -> None:
        self._where, self._left = where, MOST_FIELDS

    def add_columns(self, count: int) -> None:
        """Count columns, before any is built."""
        if count > MOST_FIELDS:
            raise TooManyFieldsError(
                f"{self._where}: the rows have {count:,} columns in all; at most {MOST_FIELDS:,} are read. Write the "
                "file with those that are used, or the others as one column of JSON text."
            )

    def add(self, column: str, kind: pa.DataType) -> None:
        """Count what a column holds."""
        count = _fields(kind)
        self._left -= count
        if self._left < 0:
            raise TooManyFieldsError(
                f"{self._where}: the objects in column `{column}` have {count:,} different keys; at most "
                f"{MOST_FIELDS:,} keys and columns are read in all. Write that column as JSON text, or leave it out of "
                "the file."
            )

    def add_values(self, column: str, values: Sequence[Any]) -> None:
        """Count what a column will hold: each row will have room for the keys of all of them."""
        kind: pa.DataType = pa.null()
        if any(isinstance(value, (dict, list)) for value in values):
            with suppress(pa.ArrowException):  # such as text beside parts, of which the table is made in another way
                kind = pa.infer_type(values)
        self.add(column, kind)


def _fields(kind: pa.DataType) -> int:
    """How many values an item of this type may hold, those of a list counted once."""
    found, waiting = 0, [kind]
    while waiting:
        one = waiting.pop()
        below = [one.field(place).type for place in range(one.num_fields)]
        waiting += below
        found += not below
    return found


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
    fields = Fields(where)
    fields.add_columns(len(counts))
    for place, name in enumerate(table.column_names):
        if name not in columns:
            fields.add(name, table.schema.field(place).type)
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
