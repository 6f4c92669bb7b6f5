"""A model by the one name that commands after training take: a run folder, a checkpoint, a model, `RUN:reference`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tether.config.arguments import build
from tether.config.fields import config_class, trainer_class
from tether.config.read import load_run_file
from tether.config.run import RunConfig, Train
from tether.data.prepare.report import REPORT
from tether.errors import ConfigError
from tether.evaluate.named_models import NamedModel, Trained
from tether.models.load import check_source, is_adapter
from tether.models.reward import is_classifier
from tether.reference.record import RECORD, TENSORS, read_record
from tether.training.checkpoint import last_checkpoint
from tether.training.saving.atomic_checkpoint import MANIFEST, require_whole
from tether.training.surface.resolved_config import CONFIG, TRAINER, recorded

REFERENCE = ":reference"
METRICS = "metrics.jsonl"
_MARKS = (CONFIG, RECORD, METRICS)
# Values of `train` that belong to the machine and the schedule and not to the model.
_OF_THE_STEPS = {field.name for field in dataclasses.fields(TrainingArguments)}


def named_model(name: str, *, dtype: str | None = None) -> NamedModel:
    """Find what a name stands for; nothing is loaded.

    Args:
        name: a run folder (its final model, or its last checkpoint), a checkpoint's folder, a model's folder, hub name
            or `.gguf` file; with `:reference` behind a run or a checkpoint, what that was trained against.
        dtype: of the weights; None: as it was trained.

    Returns:
        The model, with what its run says of it.

    Raises:
        ConfigError: nothing is there, or what is there is no model.
    """
    wanted = name.removesuffix(REFERENCE)
    folder = Path(wanted).expanduser()
    run = _run_folder(folder)
    if name.endswith(REFERENCE) and run is None:
        why = "is not the folder of a run" if folder.is_dir() else "does not exist"
        raise ConfigError(
            f"'{name}': '{wanted}' {why}. A reference belongs to a run: name the run folder or one of its checkpoints."
        )
    if run is None:
        if not is_classifier(folder):
            check_source(wanted)
        return NamedModel(name, wanted, dtype=dtype)
    return NamedModel(
        name,
        str(_weights(folder)),
        role="reference" if name.endswith(REFERENCE) else "policy",
        trained=_trained(run, _weights(folder)),
        dtype=dtype,
    )


def _run_folder(folder: Path) -> Path | None:
    """The run that a folder is of; None for another folder."""
    absolute = folder.absolute()
    for place in (folder, absolute.parent) if absolute.name.startswith("checkpoint-") else (folder,):
        if any((place / mark).is_file() for mark in _MARKS):
            # A checkpoint has a record of the reference too; the configuration is in the folder above.
            inside = place == folder and absolute.name.startswith("checkpoint-")
            return absolute.parent if inside else place
    return None


def _weights(folder: Path) -> Path:
    """The folder with the final model of a run, or its last whole checkpoint."""
    if (folder / MANIFEST).is_file():
        require_whole(folder)
    if is_adapter(folder) or any(folder.glob("*.safetensors")):
        return folder
    last = last_checkpoint(folder)
    if last is None:
        raise ConfigError(
            f"The run folder '{folder}' holds neither a final model nor a whole checkpoint. Let the run finish, or go "
            "on with --resume."
        )
    return last


def _trained(run: Path, weights: Path) -> Trained:
    place = weights if (weights / RECORD).is_file() else run
    record = read_record(place)
    rows = _training_rows(run)
    form = rows.get("form")
    facts: dict[str, Any] = {
        "conversational": None if form is None else form != "standard",
        "rows": rows.get("fingerprint"),
    }
    if record is not None:
        facts["identity"] = record[0]
        facts |= {} if record[0].sync is None else _moved(run, place)
    if not (run / CONFIG).is_file():
        return Trained(run, **facts)
    given = recorded(run / CONFIG)
    if given is not None:
        return Trained(run, **_by_python(run / CONFIG, given), **facts)
    config = load_run_file(run / CONFIG)
    return Trained(
        folder=run,
        model=config.model.name,
        args=build(_of_the_model(config))[0],
        algorithm=trainer_class(config.objective.loss).algorithm_class,
        reference_model=config.reference.model,
        **facts,
    )


def _by_python(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What is known of a run that a script started, from what its trainer wrote down."""
    import tether.training

    trainer = getattr(tether.training, str(given[TRAINER]), None)
    if trainer is None:  # a class of the script's own
        return {"model": given.get("model"), "reference_model": given.get("ref_model")}
    kind = trainer.algorithm_class.config
    own = {field.name: field.default for field in dataclasses.fields(kind) if field.name not in _OF_THE_STEPS}
    kept = {name: value for name, value in given.get("args", {}).items() if name in own and value != own[name]}
    try:
        args = kind(output_dir=str(path.parent), use_cpu=True, bf16=False, **kept)
    except TypeError as error:
        raise ConfigError(
            f"{path} holds what {kind.__name__} does not take ({error}). Correct or remove it."
        ) from error
    return {
        "model": given.get("model"),
        "args": args,
        "algorithm": trainer.algorithm_class,
        "reference_model": given.get("ref_model"),
    }


def _moved(run: Path, place: Path) -> dict[str, Any]:
    """How often a moving reference had moved and where its values are; the run folder's own record is of the start."""
    if place == run:
        last = last_checkpoint(run)
        if last is None or int(last.name.rpartition("-")[2]) != _last_step(run):
            return {}
        place = last
    moves = int(json.loads((place / RECORD).read_text(encoding="utf-8")).get("moves", 0))
    return {"moves": moves, "tensors": place / TENSORS}


def _last_step(run: Path) -> int:
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return max((int(json.loads(line).get("step", 0)) for line in lines if line.endswith("}")), default=0)


def _training_rows(run: Path) -> dict[str, Any]:
    """What preparation reported of them; nothing where a run left no report."""
    path = run / REPORT
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return data.get("train") or {}


def _of_the_model(config: RunConfig) -> RunConfig:
    """The run without what belongs to a machine, a schedule or its rewards, so that it is read anywhere."""
    own = {field.name for field in dataclasses.fields(config_class(config.objective.loss))} - _OF_THE_STEPS
    # The file names every default too, and some may only be given where they take effect.
    given = config.model_dump(exclude_defaults=True)
    kept = {*Train.model_fields, *own}
    given["train"] = {name: value for name, value in given.get("train", {}).items() if name in kept}
    if "rewards" in given:
        given["rewards"] = [{"model": "unused"}]
    return RunConfig.model_validate(given)
