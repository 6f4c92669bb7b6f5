"""One file of the store: a part, written whole, that pyarrow maps into memory and reads.

A part is an Arrow IPC file of one record batch with one row per completion: `key` (16 bytes), `crc` (of the key and the
values), `token_logps` (a list of floats). Any program that reads Arrow reads it; nothing here computes where bytes lie.

By hand are the key and the two checksums, since Arrow has none: `crc` for each completion, which is compared whenever
its values are read, and one in the schema's metadata over keys and `crc`s, which is compared when a part is opened.
"""

from __future__ import annotations

import io
import json
import secrets
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from tether.errors import StoreError

KEY_BYTES = 16
SUFFIX = ".arrow"
_META = b"tether.store"
_FORMAT = 1


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
            raise StoreError(f"Got values in {self.dtype!r}; a store keeps float32 or float16.")

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
    """What a part has besides its values: n keys, their checksums, the tokens of all completions together."""

    namespace: Namespace
    keys: np.ndarray  # uint8 [n, 16]
    crcs: np.ndarray  # uint32 [n]
    tokens: int


class PartValues:
    """The log-probabilities of a part by row, as views of its file; whoever takes one compares its `crc_of`.

    Args:
        source: the bytes of a part, or an open file; what is mapped stays so when the file is closed.

    Raises:
        StoreError: it is torn, damaged, or no part of a store.
    """

    def __init__(self, source: Any) -> None:
        with _as_store_errors():
            column = _read(source)[1].column("token_logps")
            # Without a copy, and without `to_numpy`, which imports pandas.
            self._offsets, self._floats = np.from_dlpack(column.offsets), np.from_dlpack(column.values)

    def __getitem__(self, row: int) -> np.ndarray:
        # A slice of numpy ends where the array ends, whatever offsets a damaged file has.
        return self._floats[self._offsets[row] : self._offsets[row + 1]]


def part_name() -> str:
    """A name that no other writer takes; names sort by time."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(6)}{SUFFIX}"


def crc_of(key: bytes, values: Any) -> int:
    """Checksum of one row; the key is in it, so that values cannot pass under another key."""
    return zlib.crc32(values, zlib.crc32(key))


def encode_part(namespace: Namespace, keys: Sequence[bytes], values: Sequence[np.ndarray]) -> bytes:
    """The bytes of a part.

    Args:
        namespace: of every row.
        keys: n keys of 16 bytes.
        values: n arrays of log-probabilities in `namespace.dtype`.
    """
    crcs = np.array([crc_of(*row) for row in zip(keys, values, strict=True)], dtype=np.uint32)
    offsets, packed = np.cumsum([0, *map(len, values)]), b"".join(keys)
    tokens = int(offsets[-1])
    header = {
        "format": _FORMAT,
        "fingerprint": namespace.fingerprint,
        "numerics": namespace.numerics,
        "dtype": namespace.dtype,
        "tokens": tokens,
        "checksum": _checksum(namespace, tokens, packed, crcs),
    }
    schema = _schema(namespace.dtype).with_metadata({_META: json.dumps(header).encode()})
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(schema.field("key").type, len(keys), [None, pa.py_buffer(packed)]),
        pa.array(crcs),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.concatenate(values))),
    ]
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue()


def decode_part(source: Any) -> PartIndex:
    """Read everything but the values of a part, which are not fetched.

    Args:
        source: its bytes, or an open file.

    Raises:
        StoreError: it is torn, damaged, or no part of a store.
    """
    with _as_store_errors():
        header, batch = _read(source, [0, 1])
        column, crcs = batch.column("key"), np.from_dlpack(batch.column("crc"))
        keys = np.frombuffer(column.buffers()[1], np.uint8, len(column) * KEY_BYTES, column.offset * KEY_BYTES)
        namespace = Namespace(header["fingerprint"], header["numerics"], header["dtype"])
        if header["format"] != _FORMAT or header["checksum"] != _checksum(namespace, header["tokens"], keys, crcs):
            raise StoreError("its keys do not match its checksum")
        return PartIndex(namespace, keys.reshape(-1, KEY_BYTES), crcs, header["tokens"])


def _schema(dtype: str) -> pa.Schema:
    logps = pa.list_(pa.from_numpy_dtype(dtype))
    return pa.schema([("key", pa.binary(KEY_BYTES)), ("crc", pa.uint32()), ("token_logps", logps)])


def _read(source: Any, columns: list[int] | None = None) -> tuple[dict[str, Any], pa.RecordBatch]:
    """The header and the one record batch of a part, with the columns of these numbers, or all."""
    options = pa.ipc.IpcReadOptions(included_fields=columns, use_threads=False)
    with pa.ipc.open_file(source, options=options) as reader:
        header = json.loads(reader.schema.metadata[_META])
        whole = _schema(header["dtype"])
        if not reader.schema.equals(whole if columns is None else pa.schema([whole.field(i) for i in columns])):
            raise StoreError("another program rewrote it: its columns are others")
        batch = reader.get_batch(0)
    batch.validate()  # every buffer is as long as the rows need
    return header, batch


@contextmanager
def _as_store_errors() -> Iterator[None]:
    """Whatever a damaged file makes pyarrow say; a file that is gone is another matter."""
    try:
        yield
    except (FileNotFoundError, StoreError):
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(f"it is not a readable part ({first})") from error


def _checksum(namespace: Namespace, tokens: int, keys: Any, crcs: Any) -> str:
    """Of the whole part: the values are in it through their own checksums."""
    digest = blake2b(namespace.digest, digest_size=KEY_BYTES)
    for piece in (str(tokens).encode(), keys, crcs):
        digest.update(piece)
    return digest.hexdigest()
