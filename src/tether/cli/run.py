"""From a checked run file to a run folder; what `tether train` and `tether demo` share."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.errors import ConfigError
from tether.files import write_whole

if TYPE_CHECKING:
    from tether.config import RunConfig
    from tether.training import PreferenceConfig, TetherTrainer

EVALUATION = "evaluation.json"
RunFile = Annotated[Path, typer.Argument(help="YAML run file.", metavar="RUN.YAML", show_default=False)]
AnyRunFile = Annotated[
    Path,
    typer.Argument(
        help="YAML run file, or a file of TRL, Axolotl or LLaMA-Factory.", metavar="RUN.YAML", show_default=False
    ),
]
# Options that several commands have; the second is of all of them.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and everything that the libraries say.")]
_HEADER = """\
# The run file as it was read, overrides and defaults of its sections filled in; reading it gives the same run.
# Keys of `train` that are not here have the defaults in docs/run_file.md.
"""
_RESULTS = ("*.safetensors", "checkpoint-*")


def make_trainer(run: RunConfig, checkpoint: Path | None = None) -> TetherTrainer:
    """Check the data, load the model, prove the reference.

    Args:
        run: a checked run file.
        checkpoint: where the run is going to resume from; None for a new run, whose output folder must hold no other.

    Raises:
        TetherError: bad input, before weights are loaded where possible.
    """
    from tether.config import build, trainer_class

    for name, value in run.variables().items():
        os.environ.setdefault(name, value)
    output = Path(run.output)
    arguments, adapter, keywords = build(run)
    if checkpoint is None:
        _refuse_used_folder(output)
    trainer = trainer_class(run.objective.loss)(args=arguments, peft_config=adapter, **keywords)
    logging.getLogger("tether").info(_batch_line(arguments))
    return trainer


def train_and_evaluate(trainer: TetherTrainer, run: RunConfig, checkpoint: Path | None = None) -> None:
    """Train with the progress display, evaluate at the end, save the model, what was found, and the page.

    The folder is this run's from before its configuration is written until the page is.

    Args:
        trainer: see `make_trainer`.
        run: what it was made from.
        checkpoint: where to resume from.
    """
    from tether.evaluate.pairs import write_pairs
    from tether.report import write_report
    from tether.training.callbacks import EvaluateLast
    from tether.training.saving.stop import one_run_at_a_time

    folder, main = trainer.run_folder, trainer.is_world_process_zero()
    trainer.described = _HEADER + run.dump_yaml()
    if trainer.eval_dataset is not None:
        trainer.add_callback(EvaluateLast())
    with one_run_at_a_time(folder, main=trainer.args.should_save):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        # With load_best_model_at_end the model is another one now than at the last evaluation.
        if trainer.eval_dataset is not None and (trainer.args.load_best_model_at_end or not _evaluated_at_end(trainer)):
            trainer.evaluate()
        if not trainer.saves_at_end:
            trainer.save_model(str(folder))
        write_pairs(trainer)
        if main:
            write_evaluation(folder, _results(trainer))
            write_report(folder)


def write_evaluation(folder: Path, results: dict[str, Any]) -> None:
    """Add results, by name, to `evaluation.json` in a run folder."""
    path = folder / EVALUATION
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if results:
        write_whole(path, json.dumps({**found, **results}, indent=2) + "\n")


def _results(trainer: TetherTrainer) -> dict[str, Any]:
    """Reward accuracy and margin on each evaluation set after the last step, with their 95 % intervals."""
    from tether.evaluate import mean_interval, wilson_interval

    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    results = {}
    for name, rows in sets.items():
        if rows is None:
            continue
        pairs, ending = len(rows), f"_{name}" if name else ""
        value = _last_of(trainer, name, "rewards/accuracies", "accuracy")  # a policy's, a reward model's
        if value is not None:
            interval = wilson_interval(round(value * pairs), pairs)
            results[f"reward_accuracy{ending}"] = _result(value, interval, pairs)
        mean, deviation = (_last_of(trainer, name, f"rewards/margins{part}") for part in ("", "_std"))
        if mean is not None and deviation is not None and pairs > 1:
            results[f"reward_margin{ending}"] = _result(mean, mean_interval(mean, deviation, pairs), pairs)
        reward, error = (_last_of(trainer, name, metric) for metric in ("reward", "reward_error"))
        if reward is not None and error is not None:
            results[f"reward{ending}"] = _result(reward, (reward - 1.96 * error, reward + 1.96 * error), pairs)
    return results


def _last_of(trainer: TetherTrainer, name: str, *metrics: str) -> float | None:
    """A metric of the last evaluation of a set, by the first of its names that was logged."""
    keys = [f"eval_{name}_{metric}" if name else f"eval_{metric}" for metric in metrics]
    logs = reversed(trainer.state.log_history)
    return next((entry[key] for entry in logs for key in keys if key in entry), None)


def _result(value: float, interval: tuple[float, float], pairs: int) -> dict[str, Any]:
    return {"value": value, "low": interval[0], "high": interval[1], "n": pairs}


def _batch_line(arguments: PreferenceConfig) -> str:
    micro, steps, devices = (
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
        arguments.world_size,
    )
    share = f", {steps} times {micro}" if steps > 1 else f", {micro}" * (devices > 1)
    split = share + f" on each of {devices} devices" * (devices > 1)
    rows = {"pair": "pairs", "prompt_only": "completions"}.get(arguments.kind, "rows")
    return f"batch: {micro * steps * devices} {rows} per step{split}"


def _refuse_used_folder(output: Path) -> None:
    """A folder with results of an earlier run would end up holding two runs, and `--resume` would not know which."""
    found = sorted(path.name for pattern in _RESULTS for path in output.glob(pattern))
    if found:
        from tether.training.checkpoint import last_checkpoint

        whole = (
            "Continue that run with --resume, write" if last_checkpoint(output) else "It has no whole checkpoint. Write"
        )
        raise ConfigError(
            f"The output folder '{output}' already holds a run ({', '.join(found[:3])}). {whole} elsewhere with "
            "output=FOLDER, or remove the folder."
        )


def _evaluated_at_end(trainer: TetherTrainer) -> bool:
    return any(
        entry.get("step") == trainer.state.global_step and any(name.startswith("eval_") for name in entry)
        for entry in trainer.state.log_history
    )
