"""The entry of the command line: which commands there are, and how each of them ends."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from tether.cli import after, data
from tether.cli.before.doctor import app as doctor
from tether.cli.before.init import init
from tether.cli.before.plan import plan
from tether.cli.demo import demo
from tether.cli.errors import explain, print_error
from tether.cli.foreign.convert import convert
from tether.cli.foreign.trl import COMMANDS, trl_command
from tether.cli.precompute.command import precompute
from tether.cli.rollouts import app as rollouts_app
from tether.cli.sample import sample
from tether.cli.store import app as store_app
from tether.cli.train import TrainCommand, train
from tether.cli.words import in_words

app = typer.Typer(
    help="Preference training that never lets the reference policy be wrong.",
    pretty_exceptions_enable=False,
)
app.command(
    "train",
    cls=TrainCommand,
    help="Train the model of a run file on its pairs, evaluate it, and write the run folder.",
)(train)
app.command("init", help="Write a run file from a few answers, or from flags.")(init)
app.command("plan", help="Say what a run will take, before any weights are read: memory, tokens, steps.")(plan)
app.command(
    "demo",
    help="Tune a real language model on preferences in minutes, compare before and after, and write the report.",
)(demo)
app.command(
    "precompute",
    help="Fill the store of a run file with the reference's log-probabilities, ahead of training.",
)(precompute)
app.command("sample", help="Sample and judge completions of a run file's prompts: pairs, ranked lists, labels.")(sample)
app.add_typer(rollouts_app, name="rollouts")
app.add_typer(store_app, name="store")
app.add_typer(data.app, name="data")

app.add_typer(doctor, name="doctor")
app.command("convert", help="Write the run file that a file of TRL, Axolotl or LLaMA-Factory stands for.")(convert)
after.register(app)
for _name in COMMANDS:
    app.command(
        _name,
        help=f"`trl {_name}` with Tether: --config FILE and TRL's flags.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(trl_command(_name))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: what follows `tether`; None takes it from the process.

    Returns:
        The exit code: 0, 2 for bad input, 1 for a failed run, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    _open_streams()
    try:
        # With standalone_mode off, errors arrive here, and the code of an early exit (--help) is returned.
        return in_words(typer.main.get_command(app))(args=arguments, prog_name="tether", standalone_mode=False) or 0
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        paragraph, code = explain(error)
        print_error(paragraph)
        return code


def _open_streams() -> None:
    """A process that was started without standard streams (`>&-`, some schedulers) has them lead nowhere: the next
    files that are opened would get their numbers, and what libraries print would be written into these."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - stays open
    # A character that a terminal's encoding lacks, or half of one in a file's name, is no reason to fail.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tether {version('tether')}")
        raise typer.Exit


@app.callback()
def _tether(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""
