"""Files of other tools on the command line: `tether convert FILE`, and what `tether train FILE` says of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tether.compat.launcher import is_first
from tether.errors import ConfigError

if TYPE_CHECKING:
    from tether.config.foreign import Conversion

# A checkpoint to go on from, where there is one.
AUTO = "auto"
As = Annotated[
    str | None,
    typer.Option(
        "--as",
        help="Of a file of TRL or of LLaMA-Factory's v1: which command it is for, such as dpo.",
        show_default=False,
    ),
]


def convert(
    file: Annotated[
        Path,
        typer.Argument(help="YAML file of TRL, Axolotl or LLaMA-Factory.", metavar="FILE", show_default=False),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to set first, in the file's own words.", metavar="KEY=VALUE"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run file to write; left out: printed.", show_default=False)
    ] = None,
    command: As = None,
) -> None:
    """Write the run file that a file of another tool stands for, and say what became of its keys.

    Raises:
        ConfigError: a key that cannot be converted, or a file that is there already.
    """
    from tether.config.foreign import convert_file
    from tether.config.foreign.write import fate_lines, run_file_text

    conversion = convert_file(file, overrides or (), command)
    for line in fate_lines(conversion):
        typer.echo(line, err=True)
    text = run_file_text(conversion)
    if output is None:
        typer.echo(text, nl=False)
        return
    if output.exists():
        raise ConfigError(f"'{output}' is there already. Name another file, or remove it.")
    output.write_text(text, encoding="utf-8")
    typer.echo(f"run file: {output}")


def say_fates(conversion: Conversion) -> None:
    """Print what became of every key."""
    from tether.config.foreign.write import fate_lines

    if is_first():
        for line in fate_lines(conversion):
            typer.echo(line, err=True)
