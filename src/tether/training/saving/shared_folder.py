"""Whether the processes of several nodes have one run folder, and go on from one checkpoint."""

from __future__ import annotations

import platform
import time
import uuid
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments

from tether.compat.launcher import processes_here
from tether.errors import ConfigError

# A network file system may show a new file to other machines some seconds late.
_SHOWN_SECONDS = 5.0


def require_one_folder(args: TrainingArguments) -> None:
    """Refuse a run folder in which the nodes of a run would not find each other's parts of a checkpoint.

    All processes call this; one that is alone, or whose node is the only one, returns at once.

    Raises:
        ConfigError: which process has another folder, or which has the same where each node was to have its own.
    """
    if args.world_size <= processes_here():
        return
    folder = Path(str(args.output_dir))
    apart = processes_apart(folder)
    if apart and not args.save_on_each_node:
        raise ConfigError(
            f"is '{folder}', which for {apart[0]} is another folder than for rank 0. All processes write their parts "
            "of a checkpoint into one: name a folder that all nodes share, or set save_on_each_node=True for a whole "
            "run folder on each node.",
            "output_dir",
        )
    if args.save_on_each_node and not apart:
        raise ConfigError(
            f"is True, and '{folder}' is one folder for all nodes, in which each would write the same files. Leave it "
            "out, or name a folder that each node has for itself.",
            "save_on_each_node",
        )


def processes_apart(folder: Path) -> list[str]:
    """The processes for which a folder is another one than for the first process, in words; the same on all of them."""
    state = PartialState()
    [name] = broadcast_object_list([f".shared-{uuid.uuid4().hex}"])
    mark = folder / name
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    try:
        state.wait_for_everyone()
        told = gather_object([(_appears(mark), f"rank {state.process_index} on {platform.node()}")])
    finally:
        if state.is_main_process:
            mark.unlink(missing_ok=True)
    return [words for found, words in told if not found]


def require_one_checkpoint(folder: Path | None, args: TrainingArguments) -> None:
    """Refuse to go on from different checkpoints on different nodes, which each have their own.

    Raises:
        ConfigError: what each node would go on from.
    """
    if args.world_size <= processes_here():
        return
    names = gather_object([folder.name if folder is not None else "none"])
    if len(set(names)) > 1:
        ranks = {name: names.index(name) for name in names}
        found = ", ".join(f"rank {rank} {name}" for name, rank in ranks.items())
        raise ConfigError(
            f"The nodes would go on from different checkpoints ({found}): one of them ended before it had written its "
            "last. Name a checkpoint that every node has: `--resume FOLDER/checkpoint-N`."
        )


def _appears(path: Path) -> bool:
    end = time.monotonic() + _SHOWN_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
