"""`tether report RUN [RUN…]`: the page of a run, or several runs on one; written, or served while they go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tether.cli.run import Debug
from tether.errors import ConfigError

HELP = "Write the page of a run, or one that compares several; with --watch serve it while the run goes on."
_COMPARISON = Path("comparison.html")


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that runs wrote.", metavar="RUN", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            help=f"The page; left out: report.html in the run folder, or {_COMPARISON} here for several runs.",
            show_default=False,
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on this machine alone and load it again as the run goes on.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(help="With --watch: where; left out: a free one.", min=1, max=65535, show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write or serve the page.

    Args:
        runs: folders.
        output: the page.
        watch: serve it instead of writing it.
        port: of the loopback.
        debug: show tracebacks, see `main`.

    Raises:
        ConfigError: a folder that no run wrote, or options that do not go together.
    """
    from tether.report import serve, write_comparison, write_report

    if watch and output is not None:
        raise ConfigError(f"Got --output {output} with --watch, which serves the page and writes none. Leave one out.")
    if port is not None and not watch:
        raise ConfigError(f"Got --port {port} without --watch, which alone serves the page. Add it, or leave it out.")
    if watch:
        serve(runs, port=port or 0, say=typer.echo)
    elif len(runs) > 1:
        typer.echo(f"report: {write_comparison(runs, output or _COMPARISON)}")
    else:
        typer.echo(f"report: {write_report(runs[0], output)}")
