"""`tether precompute run.yaml [key=value …]`: fill the store of a run file ahead of training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tether.cli.errors import Interrupted
from tether.cli.run import Debug, RunFile
from tether.errors import ConfigError

if TYPE_CHECKING:
    from tether.config import RunConfig
    from tether.training.store import StoreFill

_STOPPED = "Stopped. What was computed is stored; the same command computes the rest."


def precompute(
    run_file: RunFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to set, as in reference.store=log_probs.", metavar="KEY=VALUE"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--ray", help="Compute in so many workers of Ray Data (tether[ray]).", min=1, show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Compute the reference's log-probabilities of every row that the store of a run lacks.

    Started again after a kill, or under torchrun, it computes what is still missing.

    Args:
        run_file: the YAML run file; it names a store.
        overrides: `key=value`, applied in order.
        workers: of Ray Data; None computes in this process, or in those of a launcher.
        debug: let the libraries speak.

    Raises:
        TetherError: bad input, or a store that does not hold what the reference says.
    """
    from tether.config.keys.unknown import refuse_at_once

    refuse_at_once(run_file, overrides or ())
    from tether.cli.output import terminal_output
    from tether.config import load_run_file
    from tether.training.store import FOLDER

    run = load_run_file(run_file, overrides or ())
    if run.reference.store is None and not run.train.further.get("precompute_ref_log_probs"):
        raise ConfigError(
            f"{run_file} names no store, so there is nothing to fill. Set `reference: {{store: FOLDER}}` in it, or "
            "give reference.store=FOLDER after it."
        )
    with terminal_output(debug):
        filled = _fill_here(run) if workers is None else _fill_by_workers(run, run_file, overrides or [], workers)
    if filled is not None:
        total = filled.present + filled.computed
        typer.echo(f"{total} completions: {filled.present} were in the store, {filled.computed} were computed")
        typer.echo(f"store: {run.reference.store or Path(run.output) / FOLDER}")


def _fill_here(run: RunConfig) -> StoreFill | None:
    """None in a process that does not speak for all."""
    from tether.cli.precompute.store_trainer import trainer_of

    trainer = trainer_of(run)
    try:
        filled = trainer.precompute_reference()
    except KeyboardInterrupt:
        trainer.run.reference.flush()
        raise Interrupted(_STOPPED) from None
    return filled if trainer.is_world_process_zero() else None


def _fill_by_workers(run: RunConfig, run_file: Path, overrides: list[str], workers: int) -> StoreFill:
    from tether.cli.precompute.pool import fill_by_workers
    from tether.compat.launcher import launched

    if launched():
        raise ConfigError(
            f"--ray {workers} was given, and a launcher has started this process as one of several. Leave one of the "
            "two out."
        )
    try:
        return fill_by_workers(run_file, overrides, workers, streaming=bool(run.data.streaming))
    except KeyboardInterrupt:
        raise Interrupted("Stopped. What was written is kept; the same command computes the rest.") from None
