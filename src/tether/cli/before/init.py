"""`tether init`: a run file from a few answers, or from flags; what is there already is guessed."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tether.errors import ConfigError

# What is learnt: name of a loss, in words.
_LEARN = {
    "sigmoid": "DPO: prefer `chosen` to `rejected`",
    "kto": "KTO: completions marked good or bad",
    "sft": "imitate the answers of conversations",
    "reward": "a reward model that prefers `chosen`",
}
# Columns by which rows are known to be of a loss; the first that are all there.
_COLUMNS = (
    ("sigmoid", ("chosen", "rejected")),
    ("kto", ("prompt", "completion", "label")),
    ("sft", ("prompt", "completion")),
    ("sft", ("messages",)),
    ("sft", ("conversations",)),
    ("sft", ("text",)),
)
# What the rows of a loss are to be named, where they are not.
_FIELDS = {"kto": ("prompt", "completion", "label"), "sft": ("prompt", "completion")}
_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".jsonl.gz", ".csv.gz", ".parquet")


def init(
    output: Annotated[Path, typer.Argument(help="Run file to write.", metavar="RUN.YAML")] = Path("run.yaml"),
    model: Annotated[str | None, typer.Option(help="Hub name, folder or .gguf file.", metavar="NAME")] = None,
    data: Annotated[str | None, typer.Option(help="File of rows, or a hub name.", metavar="FILE")] = None,
    learn: Annotated[str | None, typer.Option(help="Loss: sigmoid, kto, sft, reward, …", metavar="LOSS")] = None,
    machine: Annotated[str | None, typer.Option(help="cpu or gpu.", metavar="KIND")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train the whole model in place of an adapter.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: take flags and guesses.")] = False,
) -> None:
    """Write a commented run file. Example: tether init run.yaml --data pairs.jsonl --yes.

    Raises:
        ConfigError: the file is there already, or no rows were named or found.
    """
    from tether.config.document import write_document

    if output.exists():
        raise ConfigError(f"'{output}' is there already. Name another file, or remove it.")
    ask = _taken if yes or not sys.stdin.isatty() else _asked
    model = model or ask("Model (hub name or folder)", _guess_model())
    data = data or ask("Rows (file or hub name)", _guess_data())
    if not data:
        raise ConfigError("No file of rows was named, and none is in this folder. Give --data FILE.")
    found = _columns(Path(data))
    learn = learn or ask("What to learn (sigmoid, kto, sft, reward, …)", _guess_loss(found))
    machine = machine or ask("Machine (cpu or gpu)", "gpu" if shutil.which("nvidia-smi") else "cpu")
    if machine not in ("cpu", "gpu"):
        raise ConfigError(f"--machine is {machine!r}; allowed are cpu and gpu.")
    unnamed = bool(found) and not _known(found)
    text = _text(
        write_document,
        model=model,
        data=data,
        learn=learn,
        machine=machine,
        full=full,
        name=output.stem,
        unnamed=unnamed,
    )
    output.write_text(text, encoding="utf-8")
    typer.echo(f"run file: {output}")
    if unnamed:
        typer.echo(
            f"first: write into `fields` of {output} which columns hold what; {data} has {', '.join(sorted(found))}"
        )
    typer.echo(f"next: tether plan {output}, then tether train {output}")


def _asked(question: str, guess: str) -> str:
    return str(typer.prompt(question, default=guess or None, err=True))


def _taken(question: str, guess: str) -> str:
    return guess


def _guess_model() -> str:
    """A folder with a model in it, or the small model of the documentation."""
    folders = sorted(path.parent for path in Path.cwd().glob("*/config.json"))
    return folders[0].name if folders else _MODEL


def _guess_data() -> str:
    """The first file whose columns are known."""
    files = sorted(path for path in Path.cwd().iterdir() if path.name.endswith(_SUFFIXES))
    known = [path.name for path in files if _known(_columns(path))]
    training = [name for name in known if not name.startswith(("eval", "test", "held", "valid"))]
    return next(iter([*training, *known]), "")


def _guess_loss(columns: frozenset[str]) -> str:
    return _known(columns) or "sigmoid"


def _known(columns: frozenset[str]) -> str:
    return next((name for name, needed in _COLUMNS if columns.issuperset(needed)), "")


def _columns(path: Path) -> frozenset[str]:
    """Names of the columns of a file's first row; empty for what is not a text file of rows."""
    if not path.is_file() or not path.name.endswith(_SUFFIXES):
        return frozenset()
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            return frozenset(pq.read_schema(path).names)
        except (OSError, ValueError):
            return frozenset()
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    kind = Path(path.stem if path.suffix == ".gz" else path.name).suffix
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:  # as Excel writes it, with a mark at the beginning
            if kind == ".csv":
                return frozenset(filter(None, next(filter(any, csv.reader(file)), ())))
            lines = (line for line in file if line.strip())
            first: Any = json.load(file) if kind == ".json" else json.loads(next(lines, ""))
    except (OSError, ValueError):
        return frozenset()  # the run itself says what is wrong with it
    row = first[0] if isinstance(first, list) and first else first
    return frozenset(row) if isinstance(row, dict) else frozenset()


def _text(
    write: Callable[..., str], *, model: str, data: str, learn: str, machine: str, full: bool, name: str, unnamed: bool
) -> str:
    def plain(value: str) -> str:
        return write([value], flow=True).strip()[1:-1]

    what = _LEARN.get(learn, "see docs/choosing_an_objective.md")
    adapter = "# lora: {r: 16}          # an adapter in place of the whole model, with far less memory"
    if not full:
        adapter = "lora: {r: 16, alpha: 32, target: all-linear}  # remove for the whole model"
    rows = plain(data)
    if unnamed:
        fields = ", ".join(f"{one}: COLUMN" for one in _FIELDS.get(learn, ("prompt", "chosen", "rejected")))
        rows = f"{{path: {rows}, fields: {{{fields}}}}}"
    device = "  use_cpu: true            # remove to use a GPU\n" if machine == "cpu" else ""
    return f"""\
# A run of Tether. `tether plan` says what it takes, `tether train` trains it; every key: docs/run_file.md.
model: {plain(model)}
{adapter}
data:
  train: {rows}
  eval: {{split: 0.05}}      # or a file of held-out rows
objective:
  loss: {plain(learn)}            # {what}
train:
  epochs: 1
  learning_rate: {"1.0e-6" if full else "1.0e-5"}
  batch_size: 16           # rows per step; the program splits it to fit the memory
  max_length: 1024         # tokens of prompt and completion
  save_total_limit: 2      # checkpoints that are kept
{device}output: {plain(f"runs/{name}")}
"""
