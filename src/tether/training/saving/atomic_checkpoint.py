"""A checkpoint is whole or absent: written beside its place, listed with sizes and hashes, synced, renamed (INV-46)."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import Trainer

from tether.compat.trainer import checkpoint_folder, checkpoints_below, push_checkpoint
from tether.errors import ConfigError, TetherError
from tether.files import is_full, put_in_place, sync, write_whole

logger = logging.getLogger("tether")
MANIFEST = "manifest.json"
# Beside the checkpoints, on their file system, so that a rename is one operation.
BESIDE = ".writing"
_NAME = re.compile(r"checkpoint-\d+")
# Endings of files that libraries look for in a checkpoint, in place of those that they wrote.
_READ = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".index.json")
# Seconds between attempts to save on a full disk, where somebody may free some.
_PAUSES = (5.0, 20.0, 60.0)
_READERS = 4


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
    beside = place.parent / BESIDE

    def attempt() -> None:
        if main:
            shutil.rmtree(beside, ignore_errors=True)  # what a killed run left half written
        wait()
        with checkpoints_below(trainer, beside):
            write(beside / place.name)
            wait()
        if main:
            finish(beside / place.name, place)
        wait()

    # Several processes are in different places when the disk of one is full: they do not try again.
    _as_space_comes_back(attempt, place, () if trainer.accelerator.num_processes > 1 else _PAUSES)
    push_checkpoint(trainer, place)
    if main:
        best = trainer.state.best_model_checkpoint
        remove_old(place, trainer.args.save_total_limit, Path(best) if best else None)


def remove_old(newest: Path, limit: int | None, best: Path | None) -> None:
    """Leave at most so many checkpoints beside the newest one: those of the lowest steps go.

    By their steps and not by their times: a clock that was put back would have the newest one removed. Those of later
    steps are of a run that was gone back from, and go first.

    Args:
        newest: the one just written, which stays.
        limit: of all; None or 0 for no limit.
        best: stays too.
    """
    if not limit or limit < 0:
        return
    here = best is not None and best.resolve().parent == newest.resolve().parent
    kept = {newest, newest.with_name(best.name)} if best is not None and here else {newest}
    found = {
        path: int(path.name.split("-")[1]) for path in newest.parent.glob("checkpoint-*") if _NAME.fullmatch(path.name)
    }
    others = sorted(found.keys() - kept, key=lambda path: (found[path] < found[newest], found[path]))
    surplus = len(found) - max(limit, len(found.keys() & kept))
    for path in others[: max(surplus, 0)]:
        shutil.rmtree(path, ignore_errors=True)


def _as_space_comes_back(attempt: Callable[[], None], place: Path, pauses: Iterable[float]) -> None:
    for pause in (*pauses, None):
        try:
            return attempt()
        except Exception as error:
            shutil.rmtree(place.parent / BESIDE, ignore_errors=True)
            if not is_full(error):
                raise
            if pause is None:
                raise TetherError(
                    f"There is no space left on the disk for {place}, which was not written; the checkpoints before "
                    "it are as they were. Free some (old checkpoint-* folders are the largest) and go on with "
                    "--resume; save_total_limit keeps fewer, save_only_model smaller ones. Where there is space, a "
                    "quota or the limit of `ulimit -f` is reached."
                ) from error
            logger.warning(f"saving: no space left on the disk for {place}; tried again in {pause:.0f} s")
            time.sleep(pause)


def finish(written: Path, place: Path) -> None:
    """List the files of a checkpoint, bring them to the disk and give it its name; nothing has that name before.

    Args:
        written: the folder it was written in, in a folder of its own beside the place.
        place: where it belongs. One that lies there already, damaged or from steps that are made again, goes.
    """
    names = _names(written)
    with ThreadPoolExecutor(_READERS) as pool:
        files = dict(zip(names, pool.map(lambda name: _entry(written / name), names), strict=True))
    text = json.dumps({"files": files}, indent=1, sort_keys=True) + "\n"
    write_whole(written / MANIFEST, text)
    for folder in (*(path for path in written.rglob("*") if path.is_dir()), written):
        sync(folder)
    put_in_place(written, place)
    sync(place.parent)
    shutil.rmtree(written.parent, ignore_errors=True)


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty where every file is there as it was written."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"has no {MANIFEST}, which is written last: it is half written"
    try:
        files: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["files"]
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"has a {MANIFEST} that cannot be read"
    inside = folder.resolve()
    for name, (size, _) in sorted(listed.items()):
        file = folder / name
        if not file.is_file():
            return f"lacks {name}"
        if inside not in file.resolve().parents:
            return f"has {name}, which is not in it but at {file.resolve()}"
        if file.stat().st_size != size:
            return f"has {file.stat().st_size} bytes in {name} where {size} were written"
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: _digest(folder / name), sorted(listed))
        different = [name for name, digest in zip(sorted(listed), found, strict=True) if digest != listed[name][1]]
    if different:
        return f"has other bytes in {different[0]} than were written"
    foreign = [name for name in _names(folder) if name not in listed and name.endswith(_READ)]
    return f"has {foreign[0]}, which was not written with it, and which a library may read" if foreign else ""


def require_whole(folder: Path) -> None:
    """Refuse a checkpoint that is not as it was written.

    Raises:
        ConfigError: with the file.
    """
    wrong = damage(folder)
    if wrong and (below := sorted(path.name for path in folder.glob("checkpoint-*"))):
        raise ConfigError(
            f"{folder} is a run folder and not a checkpoint: it holds {', '.join(below)}. Name one of them, or resume "
            "without a path (in Python train(resume_from_checkpoint=True)), which takes the newest whole one."
        )
    if wrong:
        raise ConfigError(
            f"The checkpoint {folder} {wrong}. Resume from a whole checkpoint: without a path, --resume takes "
            "the newest one."
        )


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files if path.name != MANIFEST)


def _entry(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
