"""Files of object stores, which are fetched before they are read. Called by `files`."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from itertools import takewhile
from pathlib import Path, PurePosixPath

import fsspec

from tether.errors import DataError
from tether.redact import masked

# Stores whose addresses name objects that an account may read; what a web server answers may be another file
# tomorrow.
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "r2", "memory")


def is_in_store(source: str) -> bool:
    """Whether a source is an address in an object store, such as `s3://bucket/rows/*.parquet`."""
    return source.partition("://")[0].lower() in STORES


@cache
def fetched(address: str, name: str) -> Path:
    """What lies at an address, as a file or folder here; once for a process, which removes it when it ends.

    Args:
        address: of an object, of all below a folder, or a pattern.
        name: what to call the rows in messages.

    Raises:
        DataError: there is nothing, it cannot be reached, or a name leads out of the folder.
    """
    said = masked(address)
    try:
        store, root = fsspec.core.url_to_fs(address)
        found = sorted(store.glob(root)) if _is_pattern(root) else sorted(store.find(root))
        if not found:
            raise DataError(f"{name}: there is nothing at `{said}`. Correct the address.")
        folder = Path(tempfile.mkdtemp(prefix="tether-fetched-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        above = _above(root, found)
        for one in found:
            place = folder / PurePosixPath(one).relative_to(above)
            if ".." in place.parts or not place.resolve().is_relative_to(folder.resolve()):
                raise DataError(f"{name}: `{said}` has an object that is called `{one}`, which is no place of a file.")
            place.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(one, str(place))
    except (OSError, ImportError, ValueError) as error:
        reason = masked((str(error).splitlines() or [type(error).__name__])[0])
        raise DataError(
            f"{name}: `{said}` could not be fetched ({reason}). Check the address and the account; the store's package "
            "of fsspec must be installed (s3fs, gcsfs, adlfs)."
        ) from error
    return folder / PurePosixPath(root).name if found == [root] else folder


def _above(root: str, found: list[str]) -> PurePosixPath:
    """The folder that what was found keeps its place in: of a pattern, what stands before its first mark."""
    path = PurePosixPath(root)
    if found == [root]:
        return path.parent
    return PurePosixPath(*takewhile(lambda part: not _is_pattern(part), path.parts))


def _is_pattern(text: str) -> bool:
    return any(mark in text for mark in "*?[")
