"""`tether sample run.yaml`: completions of a run file's prompts, judged, as rows that `tether train` reads."""

from __future__ import annotations

import json
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.cli.run import Debug, RunFile
from tether.compat.launcher import processes
from tether.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tether.config import RunConfig
    from tether.training.online.preferences import Making

# Keys of `train` that say how a model is computed; those of optimization, evaluation and saving have nothing to do.
_COMPUTING = (
    *("use_cpu", "bf16", "fp16", "seed", "cpu_matmul", "attention_backend", "scoring_layout"),
    *("max_tokens_per_forward", "dataset_num_proc", "prompt_boundary"),
)


class RowsForm(StrEnum):
    """What `--as` takes."""

    ranked = "ranked"
    pairs = "pairs"
    unpaired = "unpaired"


def sample(
    run_file: RunFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to set, as in rollout.group=8 rollout.temperature=0.7.", metavar="KEY=VALUE"),
    ] = None,
    form: Annotated[
        RowsForm, typer.Option("--as", help="pairs: the best against the worst; ranked lists; or labelled completions.")
    ] = RowsForm.pairs,
    to: Annotated[
        Path | None, typer.Option(help="JSONL to write; left out: samples.jsonl in the output folder.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Leave out pairs whose rewards differ by no more.", min=0)] = 0.0,
    threshold: Annotated[
        float | None,
        typer.Option(help="Of labels: true above, false below; left out: the mean of the prompt's other completions."),
    ] = None,
    truncated: Annotated[
        bool, typer.Option("--truncated", help="Also take completions that were cut off at rollout.max_tokens.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Sample K completions for each prompt, judge them, and write rows for training.

    Args:
        run_file: with `model`, `data.train`, `rewards` and `rollout`.
        overrides: `key=value`, applied in order.
        form: of the rows.
        to: the file.
        margin: of pairs.
        threshold: of labels.
        truncated: whether completions that were cut off are taken.
        debug: let the libraries speak.

    Raises:
        TetherError: bad input, or a reward that failed.
    """
    from tether.cli.output import terminal_output
    from tether.config import load_run_file
    from tether.training.online.preferences import Making

    if margin and form is not RowsForm.pairs:
        raise ConfigError(f"--margin is of pairs, and --as is {form.value}. Leave it out.")
    if threshold is not None and form is not RowsForm.unpaired:
        raise ConfigError(f"--threshold is of labelled completions, and --as is {form.value}. Leave it out.")
    if processes() > 1:
        raise ConfigError("`tether sample` runs in one process. Start one for each part of the prompts (data.train).")
    run = load_run_file(run_file, overrides or ())
    target = to or Path(run.output) / "samples.jsonl"
    if target.exists():
        raise ConfigError(f"{target} exists. Remove it, or write elsewhere with --to FILE.")
    making = Making(form.value, margin, threshold, truncated)
    with terminal_output(debug):
        counts = _write(_sampling(run, target), target, making)
    for line in _said(counts, target):
        typer.echo(line)


def _sampling(run: RunConfig, target: Path) -> RunConfig:
    """The run with nothing but what sampling needs: no loss, no reference, no adapter that would begin at zero."""
    from tether.config.run import Objective
    from tether.config.sections import Reference

    if not run.rewards:
        raise ConfigError("`rewards` is missing: completions are sampled, and something must say which are better.")
    kept = {name: value for name, value in run.train.further.items() if name in _COMPUTING}
    changes: dict[str, Any] = {
        "objective": Objective(loss="grpo"),
        "reference": Reference(),
        "lora": None,
        "peft": None,
        "data": run.data.model_copy(update={"eval": None}),
        "train": type(run.train)(batch_size=1, **kept),
        "output": str(target.with_suffix("")),
    }
    return run.model_copy(update=changes)


def _write(run: RunConfig, target: Path, making: Making) -> Counter:
    from tether.config import build, trainer_class
    from tether.training.online.preferences import sampled_rows

    arguments, _, keywords = build(run)
    trainer: Any = trainer_class(run.objective.loss)(args=arguments, **keywords)
    if "images" in trainer.run.source.rows.column_names:
        raise DataError("The prompts have images, which the rows that are written could not hold. Sample text prompts.")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished, counts = target.with_suffix(".unfinished"), Counter()
    with unfinished.open("w", encoding="utf-8") as file:
        for rows, found in sampled_rows(trainer.run.source, trainer.run.algorithm.made, making):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            counts.update(found)
    unfinished.replace(target)
    return counts


def _said(counts: Counter, target: Path) -> list[str]:
    """What was written, and what was left out."""
    left = [f"{counts[name]} {name}" for name in ("cut off", "without a reward", "empty", "equal to another")]
    lines = [f"{counts['prompts']} prompts, {counts['completions']} completions ({', '.join(left)} were left out)"]
    if counts["without a preference"]:
        lines.append(f"{counts['without a preference']} prompts have no preference among their completions")
    return [*lines, f"{counts['rows']} rows: {target}", f"completions: {target.with_suffix('') / 'rollouts'}"]
