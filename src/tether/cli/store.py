"""`tether store info | verify | compact | export PATH`: what is done to a store as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tether.cli.run import Debug
from tether.errors import StoreError

if TYPE_CHECKING:
    from tether.reference.store_tools import StoreReport

app = typer.Typer(help="Look into, check, compact or export a store of reference log-probabilities.")
StorePath = Annotated[
    str, typer.Argument(help="Folder or fsspec address of the store.", metavar="PATH", show_default=False)
]
_SMALL_PARTS = 20
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@app.command("info", help="What a store holds: references, completions, tokens, size.")
def info(path: StorePath, debug: Debug = False) -> None:
    """Print what a store holds."""
    from tether.reference.store_tools import describe_store

    _print_report(describe_store(path))


@app.command("verify", help="Read every value and check it against its checksum.")
def verify(path: StorePath, debug: Debug = False) -> None:
    """Check a whole store.

    Raises:
        StoreError: a part is damaged.
    """
    from tether.reference.store_tools import describe_store

    report = describe_store(path, values=True)
    if report.damaged:
        _print_report(report)
        raise StoreError(
            f"{len(report.damaged)} damaged parts in '{path}'. Delete them: what they held is computed again by the "
            "next run, or now by `tether precompute`."
        )
    typer.echo(f"{report.completions} completions, every value matches its checksum")


@app.command("compact", help="Merge small parts into large ones, keep each completion once, remove unfinished files.")
def compact(path: StorePath, debug: Debug = False) -> None:
    """Merge a store's parts; runs may go on meanwhile."""
    from tether.reference.store_tools import compact_store

    before, after = compact_store(path)
    typer.echo(f"{before} parts before, {after} after")


@app.command("export", help="Write all of a store into one .parquet or .jsonl file for other programs.")
def export(
    path: StorePath,
    target: Annotated[Path, typer.Argument(help="New file.", metavar="FILE", show_default=False)],
    debug: Debug = False,
) -> None:
    """Write a store into one file."""
    from tether.reference.store_tools import export_store

    typer.echo(f"{export_store(path, target)} completions written to {target}")


def _print_report(report: StoreReport) -> None:
    from tether.reference.store_tools import numerics_words

    typer.echo(f"store {report.path}: {report.completions} completions")
    for one in report.namespaces:
        again = f", {one.repeated} of them more than once" if one.repeated else ""
        typer.echo(
            f"  {one.namespace.fingerprint}, {numerics_words(one.namespace)}: {one.completions} completions{again}, "
            f"{one.tokens} tokens, {one.parts} parts, {_size(one.file_bytes)}"
        )
    for name, reason in report.damaged.items():
        typer.echo(f"  damaged, not used: {name}: {reason}")
    if report.leftovers:
        typer.echo(f"  {len(report.leftovers)} unfinished files of writers that are at work or were killed")
    if sum(one.parts for one in report.namespaces) > _SMALL_PARTS * len(report.namespaces):
        typer.echo("  many parts: `tether store compact` merges them")


def _size(count: float) -> str:
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.{min(power, 1)}f} {_UNITS[power]}"
