"""`tether merge RUN`: adapters written into their base, proved to be what was trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tether.cli.after.options import Format, Model, Split, print_json, source_of
from tether.cli.run import AsJson, Debug

if TYPE_CHECKING:
    from tether.evaluate.merge import Merged

HELP = "Write a run's adapters into their base as safetensors; the result is compared with what was trained."


def merge(
    model: Model,
    output: Annotated[Path, typer.Option("--output", help="New folder.", show_default=False)],
    data: Annotated[
        str | None, typer.Option("--data", help="Pairs to compare on; left out: random tokens.", show_default=False)
    ] = None,
    layout: Format = None,
    split: Split = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights to write; left out: as the base was trained.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Model to merge into; left out: the one that the adapter names.", show_default=False),
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Merge into another base than was trained with.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Merge, compare, write.

    Raises:
        TetherError: there is nothing to merge, it cannot be merged, or the result would be another model.
    """
    from tether.cli.output import terminal_output
    from tether.config.model_names import named_model
    from tether.evaluate.merge import merge as merge_adapters
    from tether.evaluate.score_rows import Reading, examples_of, load_for

    with terminal_output(debug):
        named = dataclasses.replace(named_model(model), base=base)
        examples = None
        if data is not None:
            reading = Reading()
            examples = examples_of(load_for(source_of(data, layout, split, 8), reading), named, reading)
        found = merge_adapters(named, output, examples=examples, dtype=dtype, any_base=any_base)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        _print(found)


def _print(found: Merged) -> None:
    proof = {True: "has the hash that the run recorded", False: "is ANOTHER one than was trained with"}
    known = (
        proof.get(bool(found.base_proved)) if found.base_proved is not None else "has no recorded hash to compare with"
    )
    what = f"{found.compared} rewards" if found.unit == "of a reward" else f"{found.compared} log-probs"
    rounded = "" if found.dtype == found.trained_dtype else f", rounded from {found.trained_dtype} to {found.dtype}"
    for line in (
        f"base: {found.base} {known}",
        f"merged: {', '.join(found.adapters)}; {found.parameters:,} numbers in {found.dtype}",
        f"{what} of {found.rows}: the adapters move one by up to {found.effect:.2g} {found.unit}; merged it is at most "
        f"{found.merged:.1e} from unmerged, and loaded from the folder {found.loaded:.1e}{rounded}",
        f"model and tokenizer: {found.folder}",
    ):
        typer.echo(line)
