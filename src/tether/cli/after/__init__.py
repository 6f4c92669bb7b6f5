"""Commands for what comes after training: evaluate, score, compare, talk to, merge, export."""

from __future__ import annotations

import typer

from tether.cli.after import chat, compare, export, merge, report, score
from tether.cli.after import eval as evaluation


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command("eval", help=evaluation.HELP)(evaluation.evaluate)
    app.command("score", help=score.HELP)(score.score)
    app.command("compare", help=compare.HELP)(compare.compare)
    app.command("chat", help=chat.HELP)(chat.chat)
    app.command("report", help=report.HELP)(report.report)
    app.command("merge", help=merge.HELP)(merge.merge)
    app.command("export", help=export.HELP)(export.export)
