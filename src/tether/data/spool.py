"""Tables that are one, which is in memory while it is small and else in a file on disk. Called by `sources` and
`prepare`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

import pyarrow as pa

# Bytes that are held in memory.
IN_MEMORY = 2**26


def spooled(tables: Iterable[pa.Table]) -> pa.Table | None:
    """Tables one after another; None where there is none.

    Columns that a table lacks are empty in it. Where the tables have more than 64 MiB, they lie in a file of the
    temporary folder (`TMPDIR`) that has no name and is gone with the last reader: the system keeps of it what memory is
    left for.

    Raises:
        pa.ArrowException: a column has different types.

    Example:
        >>> spooled(pa.table({"n": [number]}) for number in range(3)).num_rows
        3
    """
    waiting: list[pa.Table] = []
    written: list[pa.Table] = []
    held = 0
    for table in tables:
        waiting.append(table)
        held += table.nbytes
        if held >= IN_MEMORY:
            written.append(_on_disk(waiting))
            waiting, held = [], 0
    if written and waiting:
        written.append(_on_disk(waiting))
        waiting = []
    found = [*written, *waiting]
    return pa.concat_tables(found, promote_options="default") if found else None


def _on_disk(tables: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables, promote_options="default")
    with tempfile.NamedTemporaryFile(prefix="tether-rows-", suffix=".arrow", delete=False) as file:
        path = file.name
    try:
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        with pa.memory_map(path) as source:  # what is mapped stays so when the file is closed or has lost its name
            return pa.ipc.open_file(source).read_all()
    finally:
        os.unlink(path)
