"""Commands for what comes after training: evaluate, score, compare, talk to, merge, export."""

from __future__ import annotations

import typer

from tether.cli.after import chat, compare, export, merge, report, score
from tether.cli.after import eval as evaluation


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command("eval", help=evaluation.HELP, epilog=evaluation.EXAMPLE)(evaluation.evaluate)
    app.command("score", help=score.HELP, epilog=score.EXAMPLE)(score.score)
    app.command("compare", help=compare.HELP, epilog=compare.EXAMPLE)(compare.compare)
    app.command("chat", help=chat.HELP, epilog=chat.EXAMPLE)(chat.chat)
    app.command("report", help=report.HELP, epilog=report.EXAMPLE)(report.report)
    app.command("merge", help=merge.HELP, epilog=merge.EXAMPLE)(merge.merge)
    app.command("export", help=export.HELP, epilog=export.EXAMPLE)(export.export)
