"""Files of other tools on the command line: `tether convert FILE`, `tether dpo --config FILE --flag value …`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.cli.run import Debug
from tether.errors import ConfigError

if TYPE_CHECKING:
    from tether.config.foreign import Conversion

# TRL's commands, without an import of what they need.
COMMANDS = ("dpo", "kto", "orpo", "cpo", "sft", "reward", "grpo", "rloo")
# A checkpoint to go on from, where there is one.
AUTO = "auto"
As = Annotated[
    str | None,
    typer.Option("--as", help="Of a file of TRL: which of its commands it is for, such as dpo.", show_default=False),
]


def convert(
    file: Annotated[Path, typer.Argument(help="YAML file of TRL, Axolotl or LLaMA-Factory.", show_default=False)],
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


def say_and_prepare(conversion: Conversion) -> None:
    """Print what became of every key, and give the run its environment, where that says nothing yet."""
    from tether.config.foreign.write import fate_lines

    if os.environ.get("RANK", "0") == "0":
        for line in fate_lines(conversion):
            typer.echo(line, err=True)
    for name, value in conversion.environment.items():
        os.environ.setdefault(name, value)


def trl_command(name: str) -> Any:
    """One of TRL's commands, as `tether NAME`."""

    def command(
        context: typer.Context,
        config: Annotated[Path | None, typer.Option(help="YAML file of TRL.", show_default=False)] = None,
        debug: Debug = False,
    ) -> None:
        from tether.cli.train import train_conversion
        from tether.config.foreign import from_flags

        conversion = from_flags(name, config, flags(context.args))
        again = ["tether", name, *(["--config", str(config)] if config else []), *context.args]
        train_conversion(conversion, None, debug, again, resume_flag="--resume_from_checkpoint=true")

    command.__doc__ = f"`trl {name}` with Tether: a YAML file of TRL, and its flags."
    return command


def flags(arguments: Sequence[str]) -> dict[str, Any]:
    """What follows TRL's command: `--flag value`, `--flag=value`, `--flag` and `--no_flag`, several values as a list.

    >>> flags(["--beta", "0.1", "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--no_bf16"])
    {'beta': 0.1, 'use_peft': True, 'lora_target_modules': ['q_proj', 'v_proj'], 'bf16': False}

    Raises:
        ConfigError: a value without a flag.
    """
    found: dict[str, list[str]] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif not name:
            raise ConfigError(f"The argument '{argument}' stands before every flag. Write --flag value.")
        else:
            found[name].append(argument)
    made: dict[str, Any] = {}
    for name, values in found.items():
        if not values and name.startswith("no_"):
            made[name.removeprefix("no_")] = False
        elif len(values) < 2:
            made[name] = _value(values[0], name) if values else True
        else:
            made[name] = [_value(value, name) for value in values]
    return made


def _value(text: str, name: str) -> Any:
    """A value as YAML reads it; text with a colon stays text."""
    from tether.config.foreign.document import parse_foreign

    value = parse_foreign(text, f"flag --{name}") if text[:1] in "{[" or ":" not in text else text
    return text if isinstance(value, (dict, list)) and text[:1] not in "{[" else value
