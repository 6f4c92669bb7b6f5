"""Where a run resumes from, what its objective knew then, and whether a model's folder belongs to an earlier run."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from tether.compat.torch import foreign_metadata
from tether.errors import ConfigError
from tether.models.adapters import load_active
from tether.models.adapting.base_rewriting import load_plain
from tether.models.structure import unwrap
from tether.reference.record import read_record
from tether.training.saving.atomic_checkpoint import damage, require_whole

logger = logging.getLogger("tether")
OBJECTIVE = "objective.json"
_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-\d+")
# Parts of a checkpoint that `save_only_model` leaves out, by the first words of their files and folders.
_OPTIMIZER = {
    "the optimizer": ("optimizer", "global_step"),
    "the schedule": ("scheduler", "global_step"),
    "the draws": ("rng_state",),
}


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
    if not isinstance(resume, (bool, str, Path)):
        raise ConfigError(
            f"is {resume!r}; expected True for the last checkpoint, or the folder of one.", "resume_from_checkpoint"
        )
    if resume is True:
        last = last_checkpoint(output_dir)
        if last is None:
            torn = any(Path(str(output_dir)).glob("checkpoint-*"))
            where = f", in another folder (output=FOLDER) or with {output_dir} removed" if torn else ""
            raise ConfigError(
                f"There is no whole checkpoint in {output_dir} to resume from. Start without resuming{where}."
            )
        return last
    if not Path(resume).is_dir():
        raise ConfigError(f"The checkpoint {resume} does not exist. Give the folder checkpoint-N of an earlier run.")
    require_whole(Path(resume))
    return Path(resume)


def last_checkpoint(output_dir: str | Path | None) -> Path | None:
    """The newest whole checkpoint of a run folder; None where there is none.

    One that is not as it was written is passed over, with a warning that says what is wrong with it.
    """
    folder = Path(output_dir) if output_dir else None
    if folder is None or not folder.is_dir():
        return None
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)}
    for _, path in sorted(found.items(), reverse=True):
        wrong = damage(path)
        if not wrong:
            return path
        logger.warning(f"{path} {wrong}; it is passed over and the checkpoint before it is taken")
    return None


def best_checkpoint(said: str, run_folder: Path, resumed: Path | None) -> Path:
    """The best checkpoint of a run: of the path that its state says, which is read from a file, the name alone counts.

    Args:
        said: the path.
        run_folder: of the run.
        resumed: the checkpoint that it went on from, beside which an earlier best one may lie.

    Raises:
        ConfigError: there is none of this name, or it is not as it was written.
    """
    name = Path(said).name
    folders = [run_folder, *([resumed.parent] if resumed is not None else [])]
    there = [folder / name for folder in folders if _NAME.fullmatch(name) and (folder / name).is_dir()]
    if not there:
        raise ConfigError(
            f"The best checkpoint is {said!r} in the run's state, and {folders[-1]} has no such checkpoint. Put it "
            "there, or go on with load_best_model_at_end=False; the newest weights are in the newest checkpoint."
        )
    require_whole(there[0])
    return there[0]


def refuse_second_run(steps: int, folder: Path | None) -> None:
    """A trainer trains once, or goes on from a checkpoint.

    Args:
        steps: that it has made.
        folder: the checkpoint that it is to go on from.

    Raises:
        ConfigError: it has made steps, and there is no checkpoint.
    """
    if steps and folder is None:
        raise ConfigError(
            f"This trainer has trained already, {steps} steps: its optimizer, schedule and batches are at their end. "
            "Go on from a checkpoint with train(resume_from_checkpoint=True), with more max_steps or num_train_epochs "
            "where all were made; or make a new trainer from trainer.policy, and say whether its reference is these "
            "weights (reference='start') or the earlier start (ref_model)."
        )


def require_parts(folder: Path, args: TrainingArguments) -> None:
    """What a checkpoint lacks is not silently begun anew.

    Args:
        folder: the checkpoint.
        args: of the run; they say whether it writes checkpoints without optimizer and schedule, so that these are
            expected, and how many processes it has, as each has a random state of its own.

    Raises:
        ConfigError: the checkpoint is no whole one, and was not meant to be without these parts.
    """
    for path in folder.rglob(".metadata"):
        if foreign := foreign_metadata(path):
            raise ConfigError(
                f"The checkpoint {folder} has a {path.name} of shards that torch did not write ({foreign}); reading it "
                "could run anything. Resume from a checkpoint that you trust."
            )
    there = [path.name for path in folder.iterdir()]
    if _STATE not in there:
        raise ConfigError(
            f"The checkpoint {folder} has no {_STATE}, so the step it stands at is unknown. Resume from a whole "
            "checkpoint, or start a new run from its weights."
        )
    lacking = [part for part, names in _OPTIMIZER.items() if not any(name.startswith(names) for name in there)]
    if not lacking:
        own = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
        others = sum(name.startswith("rng_state") for name in there) - args.world_size
        if own not in there or others > 0:
            logger.warning(
                f"resuming from {folder} with another number of processes ({args.world_size}) than wrote it: the rows "
                "are the same in the same order, dropout draws anew, and sums are in another order"
            )
        return
    if len(lacking) < len(_OPTIMIZER) or not args.save_only_model:
        raise ConfigError(
            f"The checkpoint {folder} is without {' and '.join(lacking)}, which would begin anew: the rest of the run "
            "would be another one. Resume from a whole checkpoint. Where it was written with save_only_model, set "
            "save_only_model=True to accept that, or start a new run from its weights."
        )
    logger.warning(
        f"resuming from {folder}, which was saved without optimizer, schedule and random state (save_only_model): "
        "the optimizer's moments and the learning-rate schedule begin anew, so that this is not the unbroken run"
    )


def write_objective(folder: Path, state: dict[str, float]) -> None:
    """Keep what an objective has learnt besides weights (BCO's running mean) in a checkpoint; nothing if empty."""
    if state:
        (folder / OBJECTIVE).write_text(json.dumps(state) + "\n", encoding="utf-8")


def read_objective(folder: Path | None) -> dict[str, float]:
    """What `write_objective` kept; empty where there is none."""
    path = folder / OBJECTIVE if folder else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}


def load_renamed(model: nn.Module | None, folder: str | Path) -> bool:
    """Load a checkpoint whose tensors have other names on disk than in the model.

    transformers writes some architectures under the names of their first release: mixtures of experts (one tensor per
    expert in place of one for all), Qwen2-VL and others. Its `Trainer` looks the model's own names up in the file,
    finds none, warns, and goes on from the weights at the start.

    Args:
        model: the model in training.
        folder: the checkpoint.

    Returns:
        Whether the names differed, so that the weights were loaded here.

    Raises:
        ConfigError: the checkpoint lacks tensors of the model.
    """
    inner = unwrap(model) if model is not None else None
    names = {name for file in Path(folder).glob("model*.safetensors") for name in _names(file)}
    if not isinstance(inner, PreTrainedModel) or not names or names <= inner.state_dict().keys():
        return False
    found: Any = type(inner).from_pretrained(
        folder, config=inner.config, dtype="auto", use_safetensors=True, output_loading_info=True
    )
    loaded, report = found
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"The checkpoint {folder} lacks {len(missing)} tensors of the model, such as {missing[0]}. Resume from a "
            "checkpoint of this model."
        )
    inner.load_state_dict(loaded.state_dict())
    return True


def load_checkpoint(model: nn.Module, folder: str | Path) -> bool:
    """Load weights where transformers would lose some, see the three functions; False: it may."""
    return load_active(model, folder) or load_plain(model, folder) or load_renamed(model, folder)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


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
            f"{recorded.fingerprint}). Say what this run is tethered to: `reference: start` for these weights as they "
            "are now, `reference: {model: ...}` (in Python `ref_model`) for the earlier one; or resume that run from "
            "its checkpoint."
        )
