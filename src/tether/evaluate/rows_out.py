"""Scored rows as a table for other programs: JSON lines or Parquet, a line for each completion."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from tether.errors import ConfigError
from tether.evaluate.score_rows import ScoredRows

ENDINGS = (".jsonl", ".parquet")


def table_of(scored: ScoredRows, names: dict[str, str]) -> pa.Table:
    """Columns `row` (from 0), `completion`, `tokens`, `logp`, `reference_logp`, `reward`, `kl`, where there are any.

    Args:
        scored: K completions of R rows.
        names: facts of the whole table, by name, kept as its metadata.
    """
    places = np.concatenate([np.arange(size) for size in scored.sizes])
    columns: dict[str, Any] = {
        "row": np.repeat(scored.source_rows, scored.sizes),
        "completion": places,
        "tokens": scored.tokens,
        "logp": scored.logps,
        "reference_logp": scored.reference_logps,
        "reward": scored.rewards,
        "kl": scored.kl,
    }
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    return table.replace_schema_metadata(names)


def check_target(path: Path) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        ConfigError: another ending, or a file that is there.
    """
    if path.suffix not in ENDINGS:
        raise ConfigError(f"The output is '{path}'; its ending must be {' or '.join(ENDINGS)}.")
    if path.exists():
        raise ConfigError(f"'{path}' is there already. Name another file, or remove it.")


def write_rows(table: pa.Table, path: Path) -> None:
    """Write beside the place and rename, so that half a file has never the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    if path.suffix == ".parquet":
        parquet.write_table(table, part)
    else:
        with part.open("w", encoding="utf-8") as file:
            for row in table.to_pylist():
                file.write(json.dumps(row) + "\n")
    part.replace(path)
