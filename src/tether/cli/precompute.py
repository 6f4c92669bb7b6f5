"""`tether precompute run.yaml [key=value …]`: fill the store of a run file ahead of training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tether.cli.errors import Interrupted
from tether.cli.run import Debug, RunFile
from tether.errors import ConfigError


def precompute(
    run_file: RunFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to set, as in reference.store=log_probs.", metavar="KEY=VALUE"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Compute the reference's log-probabilities of every row that the store of a run lacks.

    Started again after a kill, or under torchrun, it computes what is still missing.

    Args:
        run_file: the YAML run file; it names a store.
        overrides: `key=value`, applied in order.
        debug: let the libraries speak.

    Raises:
        TetherError: bad input, or a store that does not hold what the reference says.
    """
    from tether.config.keys.quick import refuse_at_once

    refuse_at_once(run_file, overrides or ())
    from tether.cli.output import terminal_output
    from tether.config import build, load_run_file, trainer_class
    from tether.training.store import FOLDER

    run = load_run_file(run_file, overrides or ())
    if run.reference.store is None and not run.train.further.get("precompute_ref_log_probs"):
        raise ConfigError(
            f"{run_file} names no store, so there is nothing to fill. Set `reference: {{store: FOLDER}}` in it, or "
            "give reference.store=FOLDER after it."
        )
    with terminal_output(debug):
        arguments, adapter, keywords = build(run)
        trainer = trainer_class(run.objective.loss)(args=arguments, peft_config=adapter, **keywords)
        try:
            filled = trainer.precompute_reference()
        except KeyboardInterrupt:
            trainer.run.reference.flush()
            raise Interrupted("Stopped. What was computed is stored; the same command computes the rest.") from None
    if trainer.is_world_process_zero():
        total = filled.present + filled.computed
        typer.echo(f"{total} completions: {filled.present} were in the store, {filled.computed} were computed")
        typer.echo(f"store: {run.reference.store or Path(run.output) / FOLDER}")
