"""`tether store info | verify | compact | export PATH`: what is done to a store as a whole."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from tether.cli.run import AsJson, Debug
from tether.errors import StoreError

if TYPE_CHECKING:
    from tether.reference.store.tools import StoreReport

app = typer.Typer(help="Look into, check, compact or export a store of reference log-probabilities.")
StorePath = Annotated[
    str, typer.Argument(help="Folder or fsspec address of the store.", metavar="PATH", show_default=False)
]
_SMALL_PARTS = 20
# Wrong completions that are listed one by one.
_SHOWN = 10
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@app.command("info", help="What a store holds: references, completions, tokens, size.")
def info(path: StorePath, as_json: AsJson = False, debug: Debug = False) -> None:
    """Print what a store holds."""
    from tether.reference.store.tools import describe_store

    report = describe_store(path)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2, default=str))
    else:
        _print_report(report)


@app.command(
    "verify", help="Check every value against its checksum and, with a run file, sampled rows against its reference."
)
def verify(
    path: StorePath,
    run_file: Annotated[
        Path | None,
        typer.Argument(help="Run file whose reference computes sampled rows again.", metavar="RUN.YAML"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to set in it, as in data.train=more.jsonl.", metavar="KEY=VALUE"),
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of the run's data to compute again.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Which rows are drawn.")] = 0,
    debug: Debug = False,
) -> None:
    """Check a whole store.

    Raises:
        StoreError: a part is damaged, or stored values are not what the reference says.
    """
    from tether.reference.store.tools import describe_store

    report = describe_store(path, values=True)
    if report.damaged:
        _print_report(report)
        raise StoreError(
            f"{len(report.damaged)} damaged parts in '{path}'. Delete them: what they held is computed again by the "
            "next run, or now by `tether precompute`."
        )
    typer.echo(f"{report.completions} completions, every value matches its checksum")
    if run_file is not None:
        _compare(path, run_file, overrides or [], rows, seed, debug)


def _compare(path: str, run_file: Path, overrides: list[str], rows: int, seed: int, debug: bool) -> None:
    """Compute sampled rows of a run file again and compare.

    Raises:
        StoreError: stored values are not what the reference says, or none of these rows is stored.
    """
    from tether.cli.output import terminal_output
    from tether.config import build, load_run_file, trainer_class
    from tether.reference.store.compare import compare_store
    from tether.training.store import evaluation_sets, open_store

    # The run itself is not started: what it would write goes to a folder that is removed.
    with TemporaryDirectory(prefix="tether-verify-") as folder, terminal_output(debug):
        run = load_run_file(run_file, [*overrides, f"output={json.dumps(folder)}"])
        arguments, adapter, keywords = build(run)
        arguments.reference_store, arguments.precompute_ref_log_probs = None, False
        trainer = trainer_class(run.objective.loss)(args=arguments, peft_config=adapter, **keywords)
        args = trainer.args
        stored = open_store(trainer.run.reference, path, args, trainer.accelerator, lambda: trainer.policy)
        sets = {"train": trainer.run.source.known, **evaluation_sets(trainer.eval_dataset)}
        found = compare_store(stored, sets, rows=rows, batch_size=args.per_device_eval_batch_size, seed=seed)
    for name, sampled in found.sampled.items():
        typer.echo(f"{name}: {found.rows[name]} of {sampled} sampled rows are stored")
    typer.echo(
        f"{found.completions} completions, {found.tokens} tokens computed again by {found.reference}: at most "
        f"{found.max_difference:.1e} nats apart, {found.mean_difference:.1e} on average (allowed {found.tolerance:.0e})"
    )
    for one in found.wrong[:_SHOWN]:
        typer.echo(f"  wrong: {one.data} row {one.row}, completion {one.completion}: {one.difference:.3g} nats apart")
    if not found.passed:
        raise StoreError(
            f"The store '{path}' does not hold what the reference says: {len(found.wrong)} of {found.completions} "
            f"compared completions have a token more than {found.tolerance:.0e} nats away, and tokens are "
            f"{found.mean_difference:.1e} nats away on average (allowed {found.tolerance / 10:.0e}). It was filled by "
            "a program that computes otherwise, or its parts were edited. Use another folder, or delete this one and "
            "fill it again."
        )


@app.command("compact", help="Merge small parts into large ones, keep each completion once, remove unfinished files.")
def compact(path: StorePath, debug: Debug = False) -> None:
    """Merge a store's parts; runs may go on meanwhile."""
    from tether.reference.store.tools import compact_store

    before, after = compact_store(path)
    typer.echo(f"{before} parts before, {after} after")


@app.command("export", help="Write all of a store into one .parquet or .jsonl file for other programs.")
def export(
    path: StorePath,
    target: Annotated[Path, typer.Argument(help="New file.", metavar="FILE", show_default=False)],
    debug: Debug = False,
) -> None:
    """Write a store into one file."""
    from tether.reference.store.tools import export_store

    typer.echo(f"{export_store(path, target)} completions written to {target}")


def _print_report(report: StoreReport) -> None:
    from tether.reference.store.tools import numerics_words

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
