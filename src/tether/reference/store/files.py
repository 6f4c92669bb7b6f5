"""Where the store's parts lie: a local folder or any fsspec path; whole writes, listings, mapped reads."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from tether.errors import ConfigError, StoreError
from tether.files import sync_open
from tether.reference.store.parts import SUFFIX, PartIndex, PartValues, decode_part

# Begins the name of a file that is being written; one that stays behind belongs to a writer that was killed.
WRITING = ".writing-"
# An upload appears whole or not at all, and a rename would be a copy.
_WHOLE_UPLOADS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "r2", "hf", "memory"}


class PartFolder:
    """The files of a store.

    Args:
        path: a folder, or an fsspec address such as `s3://bucket/store` or `memory://store`.

    Raises:
        ConfigError: the address needs a package that is not installed, or is a file.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self.fs, self.root = fsspec.core.url_to_fs(str(Path(path).expanduser() if "://" not in str(path) else path))
            is_file = self.fs.isfile(self.root)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"The store '{path}' cannot be reached: {error}. Name a local folder, or install the fsspec package of "
                "that protocol."
            ) from error
        if is_file:
            raise ConfigError(
                f"The store '{path}' is a file; a store is a folder, which is made when it is first used."
            )
        self.path, self.local = str(path), isinstance(self.fs, LocalFileSystem)
        protocols = self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,)
        self._uploads_whole = not _WHOLE_UPLOADS.isdisjoint(protocols)
        self._mapped: dict[str, PartValues] = {}

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of each part by its name inside the store, oldest first; files that are still being written are none.

        Args:
            below: a folder of the store; empty for all.
        """
        return {name: size for name, size in self._files(below) if self._is_part(name)}

    def leftovers(self) -> dict[str, float]:
        """Seconds since the last change of each unfinished file, by name."""
        names = [name for name, _ in self._files("") if name.rsplit("/", 1)[-1].startswith(WRITING)]
        now = time.time()
        return {name: now - self.fs.modified(self._full(name)).timestamp() for name in names}

    def _files(self, below: str) -> list[tuple[str, int]]:
        where = self._full(below) if below else self.root
        self.fs.invalidate_cache(where)
        try:
            found = self.fs.find(where, detail=True)
        except FileNotFoundError:
            return []
        start = len(self.root.rstrip("/")) + 1
        return sorted((path[start:], int(entry["size"] or 0)) for path, entry in found.items())

    def _is_part(self, name: str) -> bool:
        return name.endswith(SUFFIX) and not name.rsplit("/", 1)[-1].startswith(WRITING)

    def _full(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def index(self, name: str) -> PartIndex:
        """Everything but the values of a part; raises FileNotFoundError, or StoreError where it cannot be read."""
        path = self._full(name)
        with pa.memory_map(path) if self.local else self.fs.open(path, "rb") as file:
            return decode_part(file)

    def values(self, name: str) -> PartValues:
        """The values of a part, mapped until `forget`; of a remote one, a copy without a name in the temporary folder.

        Raises:
            OSError: it is gone, or cannot be fetched.
            StoreError: it cannot be read.
        """
        if name not in self._mapped:
            with contextlib.ExitStack() as stack:
                path = self._full(name)
                if not self.local:
                    copy = stack.enter_context(tempfile.NamedTemporaryFile(prefix="tether-store-")).name
                    self.fs.get_file(path, copy)
                    path = copy
                # A file that is closed, or has lost its name, stays mapped; many parts do not use up the open files.
                self._mapped[name] = PartValues(stack.enter_context(pa.memory_map(path)))
        return self._mapped[name]

    def write(self, name: str, data: bytes) -> None:
        """Write a part so that others see it whole or not at all.

        Raises:
            StoreError: the system refused.
        """
        folder, _, last = name.rpartition("/")
        target, unfinished = self._full(name), self._full(f"{folder}/{WRITING}{last}")
        try:
            if self.local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                with open(unfinished, "wb") as file:
                    file.write(data)
                    file.flush()
                    sync_open(file.fileno())
                os.replace(unfinished, target)
            elif self._uploads_whole:
                self.fs.pipe_file(target, data)
            else:
                self.fs.makedirs(self._full(folder), exist_ok=True)
                self.fs.pipe_file(unfinished, data)
                self.fs.mv(unfinished, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.fs.rm_file(unfinished)  # on a full disk it would stay in the way
            raise self._refusal(error) from error

    def require_writable(self, below: str) -> None:
        """Find out early whether a local folder takes files; nothing is left in it.

        Args:
            below: the folder of a namespace.

        Raises:
            StoreError: the system refused.
        """
        if not self.local:
            return
        folder = Path(self._full(below))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder, prefix=WRITING):
                pass
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> StoreError:
        return StoreError(
            f"The store '{self.path}' could not be written: {error}. Free space or change its rights, or name "
            "another folder; what it holds is intact."
        )

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; one that is gone already is no error."""
        for name in names:
            self.forget(name)
            try:
                self.fs.rm_file(self._full(name))
            except FileNotFoundError:
                continue

    def forget(self, name: str) -> None:
        """Let go of a part's mapping."""
        self._mapped.pop(name, None)
