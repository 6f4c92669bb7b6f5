"""What the commands after training have in common: how models and rows are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.cli.words import rows_named
from tether.files import write_whole

if TYPE_CHECKING:
    from tether.evaluate.named_models import Loaded, NamedModel

MODEL = (
    "A run folder, one of its checkpoints, a model's folder, hub name or .gguf file; RUN:reference is what a run was "
    "trained against."
)
Model = Annotated[str, typer.Argument(help=MODEL, metavar="RUN|MODEL", show_default=False)]
DataFile = Annotated[
    str,
    typer.Option("--data", help="Rows: a file, folder or hub name, or a mapping as in a run file.", show_default=False),
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference", help="What to compare with, named as the model is; left out: the run's reference. none: nothing."
    ),
]
Format = Annotated[str | None, typer.Option("--format", help="Layout of the rows, such as chatml.intel.")]
Split = Annotated[str | None, typer.Option("--split", help="Part of a hub data set or folder.")]
Dtype = Annotated[
    str | None, typer.Option(help="Type of the weights, such as bfloat16; left out: as they were trained.")
]
Beta = Annotated[
    float | None, typer.Option(help="Multiplies log-ratios; left out: the reward of the run's own objective.", min=0.0)
]
MaxTokens = Annotated[int, typer.Option(help="Tokens computed at once.", min=2)]
MaxLength = Annotated[int | None, typer.Option("--max-length", help="Limit in tokens; left out: the run's.", min=2)]
First = Annotated[int | None, typer.Option("--first", help="Only so many rows.", min=1)]
NONE = "none"


def source_of(data: str, layout: str | None = None, split: str | None = None, first: int | None = None) -> Any:
    """Rows as `load_rows` takes them."""
    named = rows_named(data)
    said = {"format": layout, "split": split, "first": first}
    given = {key: value for key, value in said.items() if value is not None}
    return {**(named if isinstance(named, dict) else {"path": named}), **given} if given else named


def named_pair(model: str, reference: str | None, dtype: str | None = None) -> tuple[NamedModel, NamedModel | None]:
    """A model, and what it is compared with: as was said, or its run's reference; None for nothing."""
    from tether.config.model_names import REFERENCE, named_model

    policy = named_model(model, dtype=dtype)
    if reference == NONE or policy.classifies:
        return policy, None if reference in (None, NONE) else named_model(reference, dtype=dtype)
    if reference is not None:
        return policy, named_model(reference, dtype=dtype)
    trained = policy.trained
    known = trained is not None and trained.identity is not None and trained.identity.meaning != NONE
    return policy, named_model(f"{model}{REFERENCE}") if known and policy.role == "policy" else None


def load_pair(policy: NamedModel, reference: NamedModel | None) -> tuple[Loaded, Loaded | None]:
    """Both of them, in the same weights where the reference is the policy with its adapter off."""
    first = policy.load()
    return first, None if reference is None else reference.load(first)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def write_text(path: Path, text: str) -> None:
    """Write a file that was asked for, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
