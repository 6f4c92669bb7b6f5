"""TRL's command line: `tether dpo --config FILE --flag value …`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tether.cli.run import Debug
from tether.errors import ConfigError

# TRL's commands, without an import of what they need.
COMMANDS = ("dpo", "kto", "orpo", "cpo", "sft", "reward", "grpo", "rloo")


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
