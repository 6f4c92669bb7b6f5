"""A checkpoint is whole or absent: written beside its place, listed with sizes and hashes, synced, renamed (INV-46)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

from tether.compat.trainer import after_checkpoint, checkpoint_folder, checkpoints_below
from tether.errors import ConfigError

MANIFEST = "manifest.json"
# Beside the checkpoints, on their file system, so that a rename is one operation.
_BESIDE = ".writing"


def save_whole(trainer: Trainer, trial: Any, write: Callable[[Path], None]) -> None:
    """Have every process write its part of a checkpoint, and give it its name when all have.

    A kill at any moment leaves the earlier checkpoints as they were. Old ones are removed afterwards.

    Args:
        trainer: at the step that is saved.
        trial: of a search over hyperparameters, or None.
        write: writes all of it into the folder it is given.
    """
    place, main, wait = (
        checkpoint_folder(trainer, trial),
        trainer.args.should_save,
        trainer.accelerator.wait_for_everyone,
    )
    beside = place.parent / _BESIDE
    if main:
        shutil.rmtree(beside, ignore_errors=True)  # what a killed run left half written
    wait()
    with checkpoints_below(trainer, beside):
        write(beside / place.name)
        wait()
    if main:
        finish(beside / place.name, place)
    wait()
    after_checkpoint(trainer, place)


def finish(written: Path, place: Path) -> None:
    """List the files of a checkpoint, bring them to the disk and give it its name; nothing has that name before.

    Args:
        written: the folder it was written in, in a folder of its own beside the place.
        place: where it belongs. One that lies there already, damaged or from steps that are made again, goes.
    """
    files = {name: _entry(written / name) for name in _names(written)}
    text = json.dumps({"files": files}, indent=1, sort_keys=True) + "\n"
    (written / MANIFEST).write_text(text, encoding="utf-8")
    _sync(written / MANIFEST)
    for folder in (*(path for path in written.rglob("*") if path.is_dir()), written):
        _sync(folder)
    if place.exists():
        place.rename(written.parent / f"replaced-{place.name}")
    written.rename(place)
    _sync(place.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty where every file is there as it was written."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"has no {MANIFEST}, which is written last: it is half written"
    try:
        files: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["files"]
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"has a {MANIFEST} that cannot be read"
    for name, (size, digest) in sorted(listed.items()):
        file = folder / name
        if not file.is_file():
            return f"lacks {name}"
        if file.stat().st_size != size:
            return f"has {file.stat().st_size} bytes in {name} where {size} were written"
        if _digest(file) != digest:
            return f"has other bytes in {name} than were written"
    return ""


def require_whole(folder: Path) -> None:
    """Refuse a checkpoint that is not as it was written.

    Raises:
        ConfigError: with the file.
    """
    wrong = damage(folder)
    if wrong:
        raise ConfigError(
            f"The checkpoint {folder} {wrong}. Resume from a whole checkpoint: without a path, --resume takes "
            "the newest one."
        )


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files if path.name != MANIFEST)


def _entry(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
