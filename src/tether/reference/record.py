"""The reference on disk: its identity in the run folder and in every checkpoint, and the tensors that rebuild it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tether.errors import ReferencePolicyError
from tether.files import write_whole
from tether.redact import masked
from tether.reference.base import Reference
from tether.reference.guard import GuardResult
from tether.types import ReferenceIdentity

RECORD = "reference.json"
TENSORS = "reference.safetensors"


def write_record(folder: Path, reference: Reference, line: str, guard: GuardResult | None) -> None:
    """Write `reference.json` into a run folder or a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"identity": reference.identity.to_dict(), "line": line}
    record["guard"] = guard.to_dict() if guard else None
    if reference.sync is not None:
        record["moves"] = reference.moves
    write_whole(folder / RECORD, masked(json.dumps(record, indent=2)) + "\n")


def write_tensors(folder: Path, reference: Reference, *, write: bool = True) -> None:
    """Write the tensors that a resumed run needs to rebuild the reference.

    A snapshot that is most of the model is left out, unless it has moved: it is the start model itself then. Every
    process must call this, since a sharded snapshot is gathered for it.

    Args:
        folder: the checkpoint.
        reference: whose tensors.
        write: whether this process writes.
    """
    if not reference.travels:
        return
    tensors = reference.state()
    if tensors and write:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / TENSORS)


def read_record(folder: Path) -> tuple[ReferenceIdentity, GuardResult | None] | None:
    """The identity and the start check recorded in a checkpoint or run folder; None where there is no record.

    Raises:
        ReferencePolicyError: a record that cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        guard = {name: value for name, value in (record["guard"] or {}).items() if name != "passed"}
        return ReferenceIdentity(**record["identity"]), GuardResult(**guard) if guard else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReferencePolicyError(f"{path} is not a record of a reference that Tether wrote ({error}).") from error


def restore(folder: Path, reference: Reference, policy: nn.Module) -> GuardResult | None:
    """Make the reference of a resumed run the one of its checkpoint, or refuse.

    Args:
        folder: the checkpoint.
        reference: what this run resolved from its own arguments; a snapshot takes the checkpoint's tensors.
        policy: the model at this run's start.

    Returns:
        The start check of the run that wrote the checkpoint.

    Raises:
        ReferencePolicyError: the two are different references; the message has both identities.
    """
    found = read_record(folder)
    if found is None:
        raise ReferencePolicyError(
            f"{folder} has no {RECORD}, so the reference it was trained against is unknown. Resume from a checkpoint "
            "that Tether wrote, or start a new run from its weights."
        )
    recorded, guard = found
    tensors: dict[str, Tensor] = load_file(folder / TENSORS) if (folder / TENSORS).is_file() else {}
    if tensors:
        reference.load_state(tensors)
    if reference.sync is not None:
        # Known even where no tensor was due yet, so that the next checkpoint holds what this one holds.
        reference.moves = _recorded_moves(folder, bool(tensors))
    mine = reference.identity
    if (mine.meaning, mine.fingerprint, mine.sync) != (recorded.meaning, recorded.fingerprint, recorded.sync):
        raise ReferencePolicyError(
            f"Resuming with another reference. The checkpoint {folder} was trained against {recorded}; this run has "
            f"{mine}. Start from the same model and the same reference settings, or begin a new run."
        )
    return guard


def _recorded_moves(folder: Path, loaded: bool) -> int:
    """How often the reference of a checkpoint had moved; a moved one without its tensors is lost."""
    moves = int(json.loads((folder / RECORD).read_text(encoding="utf-8")).get("moves", int(loaded)))
    if moves and not loaded:
        raise ReferencePolicyError(
            f"The reference of the checkpoint {folder} had moved {moves} times, but {TENSORS}, which held it, is not "
            "there. Restore the file, or resume from another checkpoint."
        )
    return moves
