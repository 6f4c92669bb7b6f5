"""`tether train run.yaml [key=value …]`: from a run file to a run folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from tether.cli.errors import Interrupted
from tether.cli.foreign.convert import AUTO, As, say_fates
from tether.cli.launch import launch
from tether.cli.run import AnyRunFile, Debug
from tether.compat.launcher import is_first, launched
from tether.errors import TetherError

if TYPE_CHECKING:
    from tether.config import RunConfig
    from tether.config.foreign import Conversion
    from tether.training import TetherTrainer

_LAST = "last"
Launch = Annotated[
    int | None,
    typer.Option(
        "--launch", min=1, help="Train in that many processes of this machine, one a device.", show_default=False
    ),
]


class TrainCommand(TyperCommand):
    """Lets `--resume` stand alone for the last checkpoint; typer has no options with a value that may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare `--resume` its value: the checkpoint that is named behind it, or the last one."""
        found, left = [], list(args)
        while left:
            arg = left.pop(0)
            if arg == "--resume":
                arg = f"--resume={left.pop(0) if left and _names_checkpoint(left[0]) else _LAST}"
            found.append(arg)
        return super().parse_args(ctx, found)


def _names_checkpoint(text: str) -> bool:
    """Whether it can be no run file and no KEY=VALUE."""
    return Path(text).is_dir() or ("=" not in text and re.search(r"checkpoint-\d+/*$", text) is not None)


def train(
    run_file: AnyRunFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Keys to set, as in train.learning_rate=1e-5 lora=null; in a foreign file's own words.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on from the last checkpoint in the output folder, or with --resume=PATH from that one.",
            metavar="[=PATH]",
            show_default=False,
        ),
    ] = None,
    command: As = None,
    processes: Launch = None,
    debug: Debug = False,
) -> None:
    """Train, evaluate and write the run folder.

    Args:
        run_file: the YAML run file.
        overrides: `key=value`, applied in order.
        resume: a checkpoint's folder, or `last`.
        command: TRL's, of a file of TRL.
        processes: how many are started; None: this one trains.
        debug: let the libraries speak.

    Raises:
        TetherError: bad input, before weights are loaded where possible, or a failed run.
    """
    # Here and not on top, so that `tether --help` does not wait for torch.
    from tether.config.keys.unknown import refuse_at_once

    refuse_at_once(run_file, overrides or ())
    from tether.config import load_run_file
    from tether.config.foreign import convert_file, is_foreign

    again = ["tether", "train", str(run_file), *(overrides or ()), *(["--as", command] if command else [])]
    if processes is not None:
        raise typer.Exit(launch(processes, [*again[1:], *_options(resume, debug)]))
    if command or is_foreign(run_file):
        train_conversion(convert_file(run_file, overrides or (), command), resume, debug, again)
    else:
        _train(load_run_file(run_file, overrides or ()), resume, debug, again)


def _options(resume: str | None, debug: bool) -> list[str]:
    return [*([f"--resume={resume}"] if resume else []), *(["--debug"] if debug else [])]


def train_conversion(
    conversion: Conversion, resume: str | None, debug: bool, again: Sequence[str], resume_flag: str = "--resume"
) -> None:
    """Train what a file of another tool became.

    Args:
        conversion: the file.
        resume: as on the command line; None: as the file says.
        debug: let the libraries speak.
        again: the command, to start once more.
        resume_flag: what it takes to go on.
    """
    from tether.training.checkpoint import last_checkpoint

    if conversion.processes > 1 and not launched():
        raise typer.Exit(launch(conversion.processes, [*again[1:], *_options(resume, debug)]))
    say_fates(conversion)
    run, wanted = conversion.run, resume or conversion.resume
    if wanted == AUTO:
        wanted = _LAST if last_checkpoint(run.output) else None
    _train(run, wanted, debug, again, resume_flag)


def _train(
    run: RunConfig, resume: str | None, debug: bool, again: Sequence[str], resume_flag: str = "--resume"
) -> None:
    from tether.cli.output import terminal_output

    with terminal_output(debug):
        try:
            trainer = _run(run, resume)
        except KeyboardInterrupt:
            raise Interrupted(f"Stopped{_how_to_go_on(Path(run.output), [*again, resume_flag])}") from None
        except TetherError:
            raise  # it says by itself what to do
        except Exception:
            if is_first():
                typer.echo(f"The run failed{_how_to_go_on(Path(run.output), [*again, resume_flag])}", err=True)
            raise
    if trainer.is_world_process_zero():
        for line in _summary(trainer, Path(run.output)):
            typer.echo(line)


def _run(run: RunConfig, resume: str | None) -> TetherTrainer:
    from tether.cli.run import make_trainer, train_and_evaluate
    from tether.training.checkpoint import resume_folder

    checkpoint = resume_folder(True if resume == _LAST else resume, run.output)
    trainer = make_trainer(run, checkpoint)
    train_and_evaluate(trainer, run, checkpoint)
    return trainer


def _how_to_go_on(output: Path, command: Sequence[str]) -> str:
    from tether.training.checkpoint import last_checkpoint

    last = last_checkpoint(output)
    if last is None:
        return ", before the first checkpoint was written. Start again with the same command."
    return f". The last checkpoint is {last}; go on from it with: {shlex.join(command)}"


def _summary(trainer: TetherTrainer, output: Path) -> list[str]:
    """Final figures and where things are, a line each."""
    from tether.training.progress import SEPARATOR, evaluations, figures

    logs, steps = trainer.state.log_history, trainer.state.global_step
    last = next((entry for entry in reversed(logs) if "loss" in entry), {})
    lines = [SEPARATOR.join([f"trained {steps} step{'s' * (steps != 1)}", *figures(last)])]
    final = {prefix: entry for entry in logs for prefix in evaluations(entry)}
    lines += [SEPARATOR.join([prefix.removesuffix("_"), *figures(entry, prefix)]) for prefix, entry in final.items()]
    lines += [line for prefix in final if (line := _gain(logs, prefix))]
    kind = "adapter" if (output / "adapter_config.json").is_file() else "model"
    return [
        *lines,
        f"{kind} and tokenizer: {output}",
        f"report: {output / 'report.html'}",
        *_next(trainer, kind, output),
    ]


def _gain(logs: Sequence[Mapping[str, Any]], prefix: str) -> str:
    """How far the reward of an evaluation set has come from its first evaluation to its last; empty with one alone."""
    known = [entry for entry in logs if f"{prefix}reward_error" in entry]
    if len(known) < 2:
        return ""
    (first, one), (last, two) = (
        (log[f"{prefix}reward"], log[f"{prefix}reward_error"]) for log in (known[0], known[-1])
    )
    change, error = last - first, 1.96 * (one**2 + two**2) ** 0.5
    seconds = next((f" in {log['train_runtime']:.0f} s" for log in reversed(logs) if "train_runtime" in log), "")
    return (
        f"reward of {prefix.removesuffix('_')}: {first:.3f} at step {known[0]['step']}, {last:.3f} at step "
        f"{known[-1]['step']}{seconds}; change {change:+.3f} (95 % interval {change - error:+.3f} to "
        f"{change + error:+.3f}, prompts as what is independent)"
    )


def _next(trainer: TetherTrainer, kind: str, output: Path) -> list[str]:
    """What can be done with what was trained."""
    folder = shlex.quote(str(output))
    if trainer.args.algorithm == "reward":
        return [f"next: open the report; judge other rows with `tether eval {folder} --data FILE`"]
    loads = {
        "adapter": f"peft.AutoPeftModelForCausalLM.from_pretrained({str(output)!r})",
        "model": f"transformers.AutoModelForCausalLM.from_pretrained({str(output)!r})",
    }
    merge = f", `tether merge {folder} --output FOLDER`" if kind == "adapter" else ""
    return [
        f"next: open the report; `tether eval {folder} --data FILE`, `tether chat {folder}`{merge}",
        f"in Python: {loads[kind]}",
    ]
