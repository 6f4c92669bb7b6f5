"""`tether export RUN|MODEL`: how a model goes into vLLM, llama.cpp and plain libraries, or why it does not."""

from __future__ import annotations

import dataclasses

import typer

from tether.cli.after.options import Model, print_json
from tether.cli.run import AsJson, Debug

HELP = "Say how a saved model goes into PEFT, transformers, vLLM and llama.cpp, or why it has to be merged before."


def export(model: Model, as_json: AsJson = False, debug: Debug = False) -> None:
    """Print the commands; nothing is written.

    Raises:
        TetherError: there is no folder at the model's name.
    """
    from tether.cli.output import terminal_output
    from tether.config.model_names import named_model
    from tether.evaluate.export import targets

    with terminal_output(debug):
        found = targets(named_model(model))
    if as_json:
        print_json([dataclasses.asdict(one) for one in found])
        return
    for one in found:
        typer.echo(f"{one.name}: " + ("as it is" if one.fits else f"not as it is: {one.reason}"))
        for command in one.commands:
            typer.echo(f"    {command}")
        typer.echo(f"    ({one.tried})")
