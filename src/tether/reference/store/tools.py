"""What is done to a store as a whole, whosever log-probabilities it holds: describe, check, compact, export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tether.errors import ConfigError, StoreError
from tether.reference.store.files import PartFolder
from tether.reference.store.index import KeyIndex
from tether.reference.store.parts import Namespace, PartIndex, crc_of, encode_part, part_name

# A merged part is written when its values reach this many bytes.
PART_BYTES = 2**27
# A file that has been unfinished for longer belongs to a writer that is no more.
_ABANDONED_SECONDS = 3600.0


@dataclass
class NamespaceReport:
    """What a store holds of one reference in one class of numerics."""

    namespace: Namespace
    parts: int = 0
    completions: int = 0
    tokens: int = 0
    file_bytes: int = 0
    repeated: int = 0  # completions that are in more than one part


@dataclass
class StoreReport:
    """What a store holds, and what of it is not used.

    Args:
        path: where it is.
        namespaces: by reference and numerics.
        damaged: part to what is wrong with it.
        leftovers: unfinished files, with their age in seconds.
    """

    path: str
    namespaces: list[NamespaceReport] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    leftovers: dict[str, float] = field(default_factory=dict)

    @property
    def completions(self) -> int:
        """Over all namespaces."""
        return sum(one.completions for one in self.namespaces)


def describe_store(path: str | Path, *, values: bool = False) -> StoreReport:
    """What a store holds.

    Args:
        path: the store.
        values: read every value too and check it against its checksum; else keys and checksums alone.

    Raises:
        ConfigError: there is no store.
    """
    folder = _existing(path)
    report = StoreReport(folder.path, leftovers=folder.leftovers())
    found: dict[Namespace, tuple[NamespaceReport, KeyIndex]] = {}
    for number, (_, size, part) in enumerate(_parts(folder, report.damaged, values=values)):
        one, index = found.setdefault(part.namespace, (NamespaceReport(part.namespace), KeyIndex()))
        index.add([(number, part)])
        one.parts, one.file_bytes = one.parts + 1, one.file_bytes + size
        one.tokens += part.tokens
    for one, index in found.values():
        one.completions, one.repeated = index.unique, len(index) - index.unique
        report.namespaces.append(one)
    return report


def compact_store(path: str | Path, *, part_bytes: int = PART_BYTES) -> tuple[int, int]:
    """Merge small parts, keep each completion once, and remove files of writers that were killed.

    Safe while others read and write: a merged part is in place before those that it replaces go. Damaged parts stay.

    Args:
        path: the store.
        part_bytes: of values, before a merged part is written.

    Returns:
        The number of sound parts before and after.

    Raises:
        ConfigError: there is no store.
    """
    folder = _existing(path)
    damaged: dict[str, str] = {}
    groups: dict[Namespace, list[tuple[str, PartIndex]]] = {}
    for name, _, part in _parts(folder, damaged, values=True):
        groups.setdefault(part.namespace, []).append((name, part))
    before, after = sum(map(len, groups.values())), 0
    for namespace, parts in groups.items():
        total = sum(part.tokens for _, part in parts) * np.dtype(namespace.dtype).itemsize
        # Nothing to gain where there is one part, or only large ones.
        if len(parts) <= -(-total // part_bytes) or len(parts) == 1:
            after += len(parts)
            continue
        after += _merge(folder, namespace, parts, part_bytes)
    folder.remove(name for name, age in folder.leftovers().items() if age > _ABANDONED_SECONDS)
    return before, after


def _merge(folder: PartFolder, namespace: Namespace, parts: list[tuple[str, PartIndex]], part_bytes: int) -> int:
    """Write the rows of parts into as few as possible, then remove those; the number written."""
    seen: set[bytes] = set()
    rows: dict[bytes, np.ndarray] = {}
    size, written = 0, 0

    def write() -> None:
        nonlocal rows, size, written
        folder.write(f"{namespace.digest.hex()}/{part_name()}", encode_part(namespace, list(rows), list(rows.values())))
        rows, size, written = {}, 0, written + 1

    for name, part in parts:
        for key, value in _rows(folder, name, part):
            if key in seen:
                continue
            seen.add(key)
            rows[key] = value
            size += value.nbytes
            if size >= part_bytes:
                write()
    if rows:
        write()
    folder.remove(name for name, _ in parts)
    return written


def export_store(path: str | Path, target: str | Path) -> int:
    """Write every completion once into one file that any program reads.

    Columns: `key` (hexadecimal), `reference` (fingerprint), `numerics`, `token_logps` (list of float32, nats).

    Args:
        path: the store.
        target: a file that ends in `.parquet` or `.jsonl`; it must not exist.

    Returns:
        Completions written.

    Raises:
        ConfigError: there is no store, the file exists, or another ending.
        StoreError: a damaged part; nothing is written then.
    """
    target = Path(target)
    if target.suffix not in (".parquet", ".jsonl") or target.exists():
        raise ConfigError(
            f"Cannot export to '{target}'; name a new file that ends in .parquet or .jsonl"
            f"{' (this one exists)' if target.exists() else ''}."
        )
    report = describe_store(path, values=True)
    if report.damaged:
        raise StoreError(
            f"The store '{path}' has damaged parts ({', '.join(report.damaged)}), so an export would lack what they "
            "held. Delete them, fill the store again with `tether precompute`, and export then."
        )
    unfinished = target.with_name(f".{target.name}.writing")
    written = (_export_parquet if target.suffix == ".parquet" else _export_lines)(_existing(path), unfinished)
    unfinished.replace(target)
    return written


def _export_parquet(folder: PartFolder, target: Path) -> int:
    text = pa.string()
    fields = [("key", text), ("reference", text), ("numerics", text), ("token_logps", pa.list_(pa.float32()))]
    schema, written = pa.schema(fields), 0
    with pq.ParquetWriter(target, schema) as writer:
        for batch in _exported(folder):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            written += len(batch)
    return written


def _export_lines(folder: PartFolder, target: Path) -> int:
    written = 0
    with target.open("w", encoding="utf-8") as file:
        for batch in _exported(folder):
            file.writelines(json.dumps({**row, "token_logps": row["token_logps"].tolist()}) + "\n" for row in batch)
            written += len(batch)
    return written


def _exported(folder: PartFolder) -> Iterator[list[dict[str, Any]]]:
    """Rows by part, each key once."""
    seen: set[bytes] = set()
    for name, _, part in _parts(folder, {}):
        same = {"reference": part.namespace.fingerprint, "numerics": numerics_words(part.namespace)}
        yield [
            {"key": key.hex(), **same, "token_logps": value.astype(np.float32)}
            for key, value in _rows(folder, name, part)
            if key not in seen and not seen.add(key)
        ]


def numerics_words(namespace: Namespace) -> str:
    """The class of numerics in words, with the dtype of the values where it is not the ordinary one."""
    return namespace.numerics + (f", kept in {namespace.dtype}" if namespace.dtype != "float32" else "")


def _existing(path: str | Path) -> PartFolder:
    folder = PartFolder(path)
    if not folder.sizes():
        raise ConfigError(
            f"There is no store in '{path}': it holds no part. Name the folder given as `reference.store`; "
            "`tether precompute` or a training run fills it."
        )
    return folder


def _parts(
    folder: PartFolder, damaged: dict[str, str], *, values: bool = False
) -> Iterator[tuple[str, int, PartIndex]]:
    """Every part that can be read, on request with right values; `damaged` takes the others."""
    for name, size in folder.sizes().items():
        try:
            part = folder.index(name)
            if not name.startswith(f"{part.namespace.digest.hex()}/"):
                raise StoreError("it lies in the folder of another reference")
            rows = zip(_rows(folder, name, part), part.crcs.tolist(), strict=True) if values else ()
            if wrong := sum(crc_of(key, value) != crc for (key, value), crc in rows):
                raise StoreError(f"{wrong} of its {len(part.keys)} values do not match their checksums")
        except FileNotFoundError:
            continue
        except (StoreError, OSError) as error:
            damaged[name] = str(error)
            continue
        yield name, size, part


def _rows(folder: PartFolder, name: str, part: PartIndex) -> Iterator[tuple[bytes, np.ndarray]]:
    values = folder.values(name)
    for row, key in enumerate(part.keys):
        yield key.tobytes(), values[row]
    folder.forget(name)
