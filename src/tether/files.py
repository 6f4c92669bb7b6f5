"""Files and folders that are whole or as they were before, at whatever instant a process ends (INV-46)."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What is said of `fsync` by file systems without one: some over a network or in user space, many for folders.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
# What libraries say of a full disk whose errors have no number; torch says the last three of any write that failed.
_FULL_WORDS = (
    "No space left on device",
    "(os error 28)",
    "Disk quota exceeded",
    "(os error 122)",
    "(os error 27)",
    "requested and",  # numpy, of an array
    "PytorchStreamWriter failed",
    "unexpected pos",
    "iostream error",
)


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place, bring it to the disk, rename it: readers see the old one or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            sync_open(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def put_in_place(written: Path, place: Path) -> None:
    """Give a folder its name. Where another has it, both are exchanged in one operation.

    Args:
        written: the folder; afterwards what lay at the place, or nothing.
        place: on the same file system. Where that cannot exchange (NFS), the name is free between two renames.
    """
    if not place.exists():
        written.rename(place)
    elif not _exchanged(written, place):
        aside = written.with_name(f"replaced-{written.name}")
        place.rename(aside)
        written.rename(place)
        aside.rename(written)


def _exchanged(one: Path, other: Path) -> bool:
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk is full, a quota used up, or a file at its limit."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if (isinstance(error, OSError) and error.errno in _FULL) or any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        sync_open(handle)
    finally:
        os.close(handle)


def sync_open(handle: int) -> None:
    """Bring an open file to the disk, where its file system knows how to be asked for that."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
