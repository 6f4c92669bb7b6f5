"""The store: reference log-probabilities on disk, computed once and read by every later run.

Content-addressed, so that it cannot be stale: a key is a digest of the reference's fingerprint, the numerics, and the
token ids of prompt and completion, and of nothing else. Usable without a trainer:

    store = Store("log_probs", Namespace(model_fingerprint(model, without_adapters=True), "float32"))
    store.put(batch.keys, values)
    store.get(batch.keys)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from tether.errors import StoreError
from tether.reference.store.files import PartFolder
from tether.reference.store.index import KeyIndex
from tether.reference.store.parts import Namespace, PartIndex, crc_of, decode_part, encode_part, part_name

logger = logging.getLogger("tether")
# What a killed process may lose: values that are computed and not yet in a part.
FLUSH_BYTES = 2**25
FLUSH_SECONDS = 30.0
_REFRESH_SECONDS = 10.0


class Store:
    """Token log-probabilities of one reference in one class of numerics, by the content of a completion.

    Any number of processes may read and write one folder at once. What is put is found at once by this object, and by
    others after `flush()` here and `refresh()` there. The index takes 28 bytes a completion; values stay on disk.

    Args:
        path: a folder or an fsspec address; made by the first write.
        namespace: whose log-probabilities.
        flush_bytes: values held in memory before a part is written.
        flush_seconds: longest time until a value that was put is written.

    Raises:
        ConfigError: an address that cannot be reached.

    Example:
        >>> with Store("memory://doctest", Namespace("s2:00ff", "float32")) as store:
        ...     store.put([b"a" * 16], [np.array([-1.5, -0.25])])
        >>> Store("memory://doctest", Namespace("s2:00ff", "float32")).get([b"a" * 16, b"b" * 16])
        [array([-1.5 , -0.25], dtype=float32), None]
    """

    def __init__(
        self,
        path: str | Path,
        namespace: Namespace,
        *,
        flush_bytes: int = FLUSH_BYTES,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        self.namespace, self.folder = namespace, PartFolder(path)
        self._below = namespace.digest.hex()
        self._kept_as = np.dtype(namespace.dtype)
        self._flush_bytes, self._flush_seconds = flush_bytes, flush_seconds
        self._pending: dict[bytes, np.ndarray] = {}
        self._pending_bytes, self._pending_since = 0, 0.0
        self._index = KeyIndex()
        self._names: list[str] = []
        self._known: dict[str, int] = {}  # part to its size, also of those that are damaged
        self.damaged: dict[str, str] = {}  # part to what is wrong with it
        self._refreshed, self._writable = 0.0, False
        self.refresh()

    def __len__(self) -> int:
        """Completions that can be read, those not yet written included."""
        return self._index.unique + len(self._pending)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flush()

    @property
    def index_bytes(self) -> int:
        """Memory of the index."""
        return self._index.nbytes

    def refresh(self, *, unless_recent: bool = False) -> None:
        """Find parts that others have written since.

        Args:
            unless_recent: do nothing if the last look is seconds ago.
        """
        if unless_recent and time.monotonic() - self._refreshed < _REFRESH_SECONDS:
            return
        sizes = self.folder.sizes(self._below)
        for name in [name for name, size in self._known.items() if sizes.get(name) != size]:
            # Merged by `compact` into another part, which was in place before this one went; or uploaded further.
            del self._known[name]
            if name in self._names:
                self._drop(self._names.index(name), None)
        self._index.add(self._read_indexes([name for name in sizes if name not in self._known]))
        self._known.update(sizes)
        self._refreshed = time.monotonic()

    def _read_indexes(self, names: list[str]) -> Iterator[tuple[int, PartIndex]]:
        for name in names:
            try:
                index = self.folder.index(name)
                if index.namespace != self.namespace:
                    raise StoreError("it belongs to another reference")
            except FileNotFoundError:
                continue
            except (StoreError, OSError) as error:
                self._report(name, str(error))
                continue
            self._names.append(name)
            yield len(self._names) - 1, index

    def _report(self, name: str, reason: str) -> None:
        if name not in self.damaged:
            self.damaged[name] = reason
            logger.warning(
                f"store: the part {name} of {self.folder.path} is not used: {reason}. Its entries are computed again; "
                "`tether store verify` lists such parts, and they may be deleted."
            )

    def kept_of(self, spaces: Sequence[Namespace]) -> list[Namespace]:
        """Which other namespaces the folder has parts of; one listing.

        Args:
            spaces: those that are asked about.
        """
        folders = {name.split("/", 1)[0] for name in self.folder.sizes()}
        return [space for space in spaces if space != self.namespace and space.digest.hex() in folders]

    def holds(self, contents: Sequence[bytes]) -> np.ndarray:
        """Which completions are stored, bool `[k]`.

        Args:
            contents: k digests, see `tether.types.Example.keys`.
        """
        keys = [self.namespace.key(content) for content in contents]
        return (self._index.find(keys) >= 0) | np.array([key in self._pending for key in keys], dtype=bool)

    def get(self, contents: Sequence[bytes]) -> list[np.ndarray | None]:
        """Values of completions, in one look-up.

        A value is checked against its checksum. A part that fails is reported and no longer used, and what only it held
        is missing.

        Args:
            contents: k digests, see `tether.types.Example.keys`.

        Returns:
            k float32 arrays of token log-probabilities in nats; None for what is missing.
        """
        keys = [self.namespace.key(content) for content in contents]
        found = [self._pending.get(key) for key in keys]
        wanted = [i for i, value in enumerate(found) if value is None]
        while wanted:
            rows = self._index.find([keys[i] for i in wanted]).tolist()
            present = [(i, row) for i, row in zip(wanted, rows, strict=True) if row >= 0]
            failed: dict[int, str | None] = {}
            for i, row in present:
                part = int(self._index.part[row])
                try:
                    found[i] = self._checked(part, row, keys[i])
                except FileNotFoundError:
                    failed[part] = None
                except (StoreError, OSError, IndexError) as error:
                    failed[part] = str(error)
            for part, reason in failed.items():
                self._drop(part, reason)
            if None in failed.values():
                self.refresh()  # what was merged away is in another part now
            wanted = [i for i, _ in present if found[i] is None]
        return [None if value is None else value.astype(np.float32) for value in found]

    def _checked(self, part: int, row: int, key: bytes) -> np.ndarray:
        value = self.folder.values(self._names[part])[self._index.row[row]]
        if crc_of(key, value) != self._index.crc[row]:
            raise StoreError("a value does not match its checksum")
        return value

    def _drop(self, part: int, reason: str | None) -> None:
        """Read a part no more; without a reason, as it is gone."""
        self._index.remove(part)
        name, self._names[part] = self._names[part], ""
        self.folder.forget(name)
        if reason is not None:
            self._report(name, reason)

    def put(self, contents: Sequence[bytes], values: Sequence[np.ndarray]) -> None:
        """Add completions; one that is stored already is left as it is.

        Args:
            contents: k digests, see `tether.types.Example.keys`.
            values: k arrays of token log-probabilities in nats.

        Raises:
            StoreError: a value that is not a number, or the disk refused.
        """
        for content, value, stored in zip(contents, values, self.holds(contents), strict=True):
            if stored:
                continue
            with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and is refused below
                numbers = np.array(value, dtype=self._kept_as)  # of our own: the caller may go on writing into his
            if numbers.ndim != 1 or not np.isfinite(numbers).all():
                raise StoreError(
                    f"A completion's log-probabilities are no finite numbers in {self.namespace.dtype}: the shape is "
                    f"{numbers.shape}, the values are {numbers.ravel()[:4]}. Is the reference right, and is float16 "
                    "wide enough?"
                )
            if not self._writable:
                # Now, and not when the first part is due: what was computed until then would be lost.
                self.folder.require_writable(self._below)
                self._writable = True
            if not self._pending:
                self._pending_since = time.monotonic()
            self._pending[self.namespace.key(content)] = numbers
            self._pending_bytes += numbers.nbytes
        late = self._pending and time.monotonic() - self._pending_since > self._flush_seconds
        if late or self._pending_bytes >= self._flush_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was put into a part of its own.

        Raises:
            StoreError: the disk refused; the values stay in memory.
        """
        if not self._pending:
            return
        name = f"{self._below}/{part_name()}"
        data = encode_part(self.namespace, list(self._pending), list(self._pending.values()))
        self.folder.write(name, data)
        self._known[name] = len(data)
        self._names.append(name)
        self._index.add([(len(self._names) - 1, decode_part(data))])
        self._pending, self._pending_bytes = {}, 0
