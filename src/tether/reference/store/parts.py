"""One file of the store: a Parquet part, written whole, whose values can be read in place.

A part has one row per completion: `key` (16 bytes), `length` (tokens), `crc` (of the key and the values), `values`
(the log-probabilities as little-endian floats). It is ordinary Parquet, uncompressed, with one page per row group, so
that the bytes of a value lie in the file as they are and a look-up is a read at an offset; nothing is decoded.
"""

from __future__ import annotations

import io
import json
import secrets
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tether.errors import StoreError

KEY_BYTES = 16
SUFFIX = ".parquet"
# Fewer than the most rows that pyarrow puts into a page, so that a row group has one.
_ROWS_PER_GROUP = 16384
_PREFIX = 4  # Parquet writes the length of a binary value before it
_META = b"tether.store"
_FORMAT = 1
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("length", pa.uint32(), nullable=False),
        pa.field("crc", pa.uint32(), nullable=False),
        pa.field("values", pa.binary(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Namespace:
    """What, besides the tokens, decides a stored number.

    Args:
        fingerprint: of the reference's weights, see `tether.models.model_fingerprint`.
        numerics: the class of arithmetic, such as `float32` or `float32 under bfloat16`.
        dtype: what values are kept in, `float32` or `float16`.

    Example:
        >>> one = Namespace("s2:00ff", "float32")
        >>> one.key(b"k" * 16) == Namespace("s2:00ff", "bfloat16").key(b"k" * 16)
        False
    """

    fingerprint: str
    numerics: str
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise StoreError(f"Values in {self.dtype!r} came; a store keeps float32 or float16.")

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for all of it."""
        text = json.dumps([self.fingerprint, self.numerics, self.dtype])
        return blake2b(text.encode(), digest_size=KEY_BYTES).digest()

    def key(self, content: bytes) -> bytes:
        """The store's key of a completion, from the digest of its tokens (`tether.types.Example.keys`)."""
        return blake2b(content, digest_size=KEY_BYTES, key=self.digest).digest()


@dataclass(frozen=True)
class PartIndex:
    """Where the rows of one part lie: n keys, offsets in the file, lengths in tokens, checksums."""

    namespace: Namespace
    keys: np.ndarray  # uint8 [n, 16]
    offsets: np.ndarray  # int64 [n], bytes
    lengths: np.ndarray  # uint32 [n], tokens
    crcs: np.ndarray  # uint32 [n]


def part_name() -> str:
    """A name that no other writer takes; names sort by time."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(6)}{SUFFIX}"


def crc_of(key: bytes, values: Any) -> int:
    """Checksum of one row; the key is in it, so that values cannot pass under another key."""
    return zlib.crc32(values, zlib.crc32(key))


def encode_part(namespace: Namespace, keys: Sequence[bytes], values: Sequence[bytes]) -> bytes:
    """The bytes of a part.

    Args:
        namespace: of every row.
        keys: n keys of 16 bytes.
        values: n times the bytes of the floats in `namespace.dtype`.

    Raises:
        StoreError: the library wrote another layout than the one that can be read in place.
    """
    width = np.dtype(namespace.dtype).itemsize
    lengths = np.array([len(value) // width for value in values], dtype=np.uint32)
    crcs = np.array([crc_of(*row) for row in zip(keys, values, strict=True)], dtype=np.uint32)
    packed = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
    header = {
        "format": _FORMAT,
        "fingerprint": namespace.fingerprint,
        "numerics": namespace.numerics,
        "dtype": namespace.dtype,
        "rows": len(keys),
        "checksum": _checksum(namespace, packed, lengths, crcs),
    }
    schema = _SCHEMA.with_metadata({_META: json.dumps(header).encode()})
    columns = [pa.array(keys, _SCHEMA.field(0).type), pa.array(lengths), pa.array(crcs), pa.array(values, pa.binary())]
    sink = io.BytesIO()
    options: dict[str, Any] = {"use_dictionary": False, "write_statistics": False, "data_page_size": 2**30}
    with pq.ParquetWriter(sink, schema, compression="NONE", **options) as writer:
        writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=_ROWS_PER_GROUP)
    data = sink.getvalue()
    # Read back as a reader would: what cannot be read must not be renamed into place.
    found = decode_part(data)
    rows = zip(found.offsets.tolist(), values, strict=True)
    if not all(data[offset : offset + len(value)] == value for offset, value in rows):
        raise StoreError(f"pyarrow {pa.__version__} wrote a part that cannot be read in place; use another version.")
    return data


def decode_part(source: Any) -> PartIndex:
    """Read everything but the values of a part.

    Args:
        source: its bytes, its path, or an open file.

    Raises:
        StoreError: it is torn, damaged, or no part of a store.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source) as file:
            header = json.loads(file.metadata.metadata[_META])
            columns = file.read(["key", "length", "crc"], use_threads=False)
            groups = [_group(file.metadata.row_group(i)) for i in range(file.metadata.num_row_groups)]
        namespace = Namespace(header["fingerprint"], header["numerics"], header["dtype"])
        lengths, crcs = columns["length"].to_numpy(), columns["crc"].to_numpy()
        keys = _key_bytes(columns["key"])
        same = header["format"] == _FORMAT and header["checksum"] == _checksum(namespace, keys, lengths, crcs)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(f"it is no readable part ({first})") from error
    if not same:
        raise StoreError("its keys do not match its checksum")
    return PartIndex(namespace, keys, _offsets(namespace, lengths, groups), lengths, crcs)


def _key_bytes(column: pa.ChunkedArray) -> np.ndarray:
    """The keys without an object for each: uint8 `[n, 16]`."""
    pieces = [np.empty((0, KEY_BYTES), np.uint8)]
    for chunk in column.chunks:
        start, count = chunk.offset * KEY_BYTES, len(chunk) * KEY_BYTES
        pieces.append(np.frombuffer(chunk.buffers()[1], np.uint8, count, start).reshape(-1, KEY_BYTES))
    return np.concatenate(pieces)


def _group(metadata: Any) -> tuple[int, int, int, bool]:
    column = metadata.column(3)
    plain = column.compression == "UNCOMPRESSED" and not column.has_dictionary_page
    return metadata.num_rows, column.data_page_offset, column.total_compressed_size, plain


def _offsets(namespace: Namespace, lengths: np.ndarray, groups: list[tuple[int, int, int, bool]]) -> np.ndarray:
    """Where each value lies: the one page of a row group is a header, then length and bytes of each row."""
    sizes = lengths.astype(np.int64) * np.dtype(namespace.dtype).itemsize + _PREFIX
    offsets, row = [np.empty(0, np.int64)], 0
    for rows, start, size, plain in groups:
        part = sizes[row : row + rows]
        header = size - int(part.sum())
        if not plain or not 0 < header < 4096:
            raise StoreError("another program rewrote it: its values are not plain")
        offsets.append(start + header + np.cumsum(part) - part + _PREFIX)
        row += rows
    return np.concatenate(offsets)


def _checksum(namespace: Namespace, keys: np.ndarray, lengths: np.ndarray, crcs: np.ndarray) -> str:
    """Of the whole part: the values are in it through their own checksums."""
    digest = blake2b(namespace.digest, digest_size=KEY_BYTES)
    for column in (keys, lengths, crcs):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
