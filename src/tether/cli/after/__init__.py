"""Commands for what comes after training: evaluate, score, compare, talk to, merge, report."""

from __future__ import annotations

import typer

from tether.cli.after import eval as evaluation


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command("eval", help=evaluation.HELP, epilog=evaluation.EXAMPLE)(evaluation.evaluate)
