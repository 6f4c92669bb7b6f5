"""Where a run resumes from, what its objective knew then, and whether a model's folder belongs to an earlier run."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from tether.errors import ConfigError
from tether.reference.record import read_record

OBJECTIVE = "objective.json"


def resume_folder(resume: bool | str | Path | None, output_dir: str | None) -> Path | None:
    """The checkpoint to resume from; None for a fresh start.

    Args:
        resume: a checkpoint's path, or True for the last one in the output folder.
        output_dir: the run folder.

    Raises:
        ConfigError: there is none.
    """
    if not resume:
        return None
    if resume is True:
        last = get_last_checkpoint(output_dir) if output_dir and Path(output_dir).is_dir() else None
        if last is None:
            raise ConfigError(f"There is no checkpoint in {output_dir} to resume from. Start without resuming.")
        return Path(last)
    if not Path(resume).is_dir():
        raise ConfigError(f"The checkpoint {resume} does not exist. Give the folder checkpoint-N of an earlier run.")
    return Path(resume)


def write_objective(folder: Path, state: dict[str, float]) -> None:
    """Keep what an objective has learnt besides weights (BCO's running mean) in a checkpoint; nothing if empty."""
    if state:
        (folder / OBJECTIVE).write_text(json.dumps(state) + "\n", encoding="utf-8")


def read_objective(folder: Path | None) -> dict[str, float]:
    """What `write_objective` kept; empty where there is none."""
    path = folder / OBJECTIVE if folder else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}


def refuse_silent_reanchoring(source: str) -> None:
    """A model that Tether trained has a reference on record; starting from it must say which reference is meant.

    Raises:
        ConfigError: `source` is such a model's folder.
    """
    folder = Path(source)
    found = read_record(folder) if folder.is_dir() else None
    if found is not None:
        recorded, _ = found
        raise ConfigError(
            f"{source} was trained by Tether against the reference {recorded.source!r} (meaning {recorded.meaning}, "
            f"{recorded.fingerprint}). Say what this run is tethered to: `reference: start` for these weights as "
            "they are "
            "now, `reference: {model: ...}` (in Python `ref_model`) for the earlier one; or resume that run from its "
            "checkpoint."
        )
