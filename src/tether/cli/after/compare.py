"""`tether compare A B`: what two models answer to the same prompts, side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tether.cli.after.options import Dtype, Format, Model, Split, print_json, source_of, write_text
from tether.cli.run import AsJson, Debug
from tether.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

    from tether.evaluate.answers.compare import Comparison
    from tether.evaluate.named_models import Loaded

HELP = "Answers of two models to the same prompts, side by side; in the terminal and as a page."
MaxNew = Annotated[int, typer.Option("--max-new-tokens", help="Most tokens of an answer.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token each time.", min=0.0)]
TopP = Annotated[float, typer.Option("--top-p", help="Draw among the tokens that hold this share.", max=1.0)]
Seed = Annotated[int, typer.Option(help="Of the draws; the same seed gives the same answers.")]


def compare(
    a: Model,
    b: Model,
    data: Annotated[
        str | None, typer.Option("--data", help="Rows of any kind, whose prompts are answered.", show_default=False)
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A prompt; may be given several times.", show_default=False)
    ] = None,
    first: Annotated[int, typer.Option("--first", help="At most so many prompts of the rows.", min=1)] = 8,
    layout: Format = None,
    split: Split = None,
    max_new_tokens: MaxNew = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    page: Annotated[Path | None, typer.Option("--html", help="Write a page that needs nothing beside it.")] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print the answers.

    Raises:
        TetherError: nothing is at a name, there are no prompts, or a model writes nothing.
    """
    from tether.cli.output import terminal_output
    from tether.config.model_names import named_model
    from tether.evaluate.answers.compare import compare_answers, comparison_page
    from tether.evaluate.answers.sampling import Generation, prompt_rows

    if (data is None) == (not prompt):
        raise ConfigError("There is nothing to answer, or two kinds of it. Give --data FILE, or --prompt TEXT.")
    generation = Generation(max_new_tokens, temperature, top_p, seed)
    with terminal_output(debug):
        names = [named_model(name, dtype=dtype) for name in (a, b)]
        rows = None if data is None else prompt_rows(source_of(data, layout, split), first)
        left, right = _load_both(names)
        prompts = rows if rows is not None else _typed(prompt or [], left, right)
        found = compare_answers(left, right, prompts, generation)
    if page is not None:
        write_text(page, comparison_page(found))
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        _print(found)
        if page is not None:
            typer.echo(f"page: {page}")


def _load_both(names: list) -> tuple[Loaded, Loaded]:
    """A reference that is the other one with its adapter off shares its weights."""
    order = sorted((0, 1), key=lambda place: names[place].role == "reference")
    found: dict[int, Loaded] = {}
    for place in order:
        beside = found.get(order[0])
        found[place] = names[place].load(beside)
    return found[0], found[1]


def _typed(texts: list[str], left: Loaded, right: Loaded) -> Dataset:
    from tether.evaluate.answers.sampling import talks, typed_prompts

    if talks(left) != talks(right):
        raise ConfigError(
            "One of the two was trained on conversations and the other on text, so a prompt means two things. Give "
            "--data FILE with prompts of one form."
        )
    return typed_prompts(texts, chat=talks(left))


def _print(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for row in found.rows:
        console.print(Text(row.prompt, style="bold"))
        table = Table(found.left, found.right, expand=True, show_lines=False)
        table.add_row(Text(row.left), Text(row.right))
        console.print(table)
    same = sum(row.left == row.right for row in found.rows)
    console.print(f"{len(found.rows)} prompts, {same} with the same answer; {found.how}", markup=False)
