"""What `tether data` prints: the audit as tables, and tokens in colour."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tether.data.audit.audit import FINDINGS
from tether.data.audit.language import EXTRA, detector

if TYPE_CHECKING:
    from tether.data.audit.audit import Check
    from tether.data.show import Token

# Part and mask to a style; the prompt is quiet, what is scored stands out.
_STYLES = {"prompt": "cyan", "scored": "black on green", "unscored": "green dim", "special": "bold magenta"}
_BOUNDARY = "▌"


def print_check(found: Check) -> None:
    """Print an audit.

    Args:
        found: what `tether.data.audit.audit.check` returned.
    """
    console = Console(highlight=False)
    looked = f"{found.rows:,} rows" if found.rows == found.total else f"{found.rows:,} of {found.total:,} rows"
    console.print(Text(f"{found.name}: {looked}, {found.kind}", style="bold"))
    table = Table("rows that …", "", "share", "first rows", box=None, pad_edge=False)
    for name, one in found.findings.items():
        style = "" if one.count else "dim"
        first = ", ".join(map(str, one.rows))
        table.add_row(Text(FINDINGS[name], style), f"{one.count:,}", f"{one.share:.1%}", Text(first, style))
    console.print(table)
    for fault in found.faults:
        console.print(Text(f"  {fault}", style="red"))
    for line in notes(found):
        console.print(Text(line))
    if found.lengths is not None:
        limits = Table("max_length", "cut", "dropped", box=None, pad_edge=False)
        for limit, one in found.lengths.limits.items():
            limits.add_row(f"{limit:,}", f"{one.cut:.1%}", f"{one.dropped:.1%}")
        console.print(limits)
    console.print()


def notes(found: Check) -> list[str]:
    """What is known of the rows besides shares, one line each."""
    lines = []
    if found.unused_columns:
        lines.append(f"not read: columns {', '.join(map(visible, found.unused_columns))}")
    if "longer_wins" in found.length_bias:
        lines.append(f"preferring the longer text is right in {found.length_bias['longer_wins']:.1%} of unequal pairs")
    if found.opening:
        lines.append(f"most frequent opening: “{visible(found.opening)}”")
    if found.markers:
        lines.append("template markers: " + ", ".join(f"{name} ({count})" for name, count in found.markers.items()))
    if len(found.scripts) > 1:
        lines.append("scripts: " + ", ".join(f"{name} {count:,}" for name, count in found.scripts.items()))
    if found.scripts and detector() is None:
        lines.append(f"languages: {EXTRA}")
    elif found.languages < found.rows:
        lines.append(f"languages: read of {found.languages:,} of the rows, drawn evenly")
    lengths = found.lengths
    if lengths is None:
        return [*lines, "lengths in tokens: name a --tokenizer"]
    for part, own in lengths.quantiles.items():
        lines.append(f"{part} tokens: " + ", ".join(f"{name} {value:,}" for name, value in own.items()))
    drawn = f" (from {lengths.rows:,} rows)" if lengths.rows < found.rows else ""
    return [
        *lines,
        f"{lengths.inexact_boundaries:.1%} of the rows have no exact prompt boundary",
        f"an epoch{drawn}: {lengths.tokens:,} tokens with prompts once, {lengths.sequence_tokens:,} without sharing; "
        f"about {lengths.petaflop_per_billion:,.3g} PFLOP for each billion parameters",
    ]


def print_tokens(parts: list[list[Token]], row: int) -> None:
    """Print the tokens of a row in colour.

    Args:
        parts: the prompt's, then each completion's.
        row: its number, from 1.
    """
    console = Console(highlight=False)
    legend = Text.assemble(
        (f"row {row}  ", "bold"),
        ("prompt", _STYLES["prompt"]),
        "  ",
        ("scored", _STYLES["scored"]),
        "  ",
        ("not scored", _STYLES["unscored"]),
        "  ",
        ("special", _STYLES["special"]),
        "  ",
        ("role:", "yellow"),
        f"  {_BOUNDARY} end of the prompt",
    )
    console.print(legend)
    for place, tokens in enumerate(parts):
        name = "prompt" if not place else f"completion {place}"
        scored = sum(token.scored for token in tokens)
        console.print(
            Text(f"— {name}: {len(tokens)} tokens" + (f", {scored} scored" if place or scored else ""), style="bold")
        )
        pieces = [piece for before, token in pairwise([None, *tokens]) for piece in _with_role(before, token)]
        console.print(Text.assemble(*pieces, _BOUNDARY if not place else ""), soft_wrap=True)


def _with_role(before: Token | None, token: Token | None) -> list[tuple[str, str]]:
    """A token, after the name of who says it where that is another than before."""
    if token is None:
        return []
    changed = token.role and (before is None or before.role != token.role)
    return [*([(f"\n{visible(token.role)}: ", "yellow")] if changed else []), _styled(token)]


def _styled(token: Token) -> tuple[str, str]:
    quiet = "prompt" if token.part == "prompt" else "unscored"
    style = _STYLES["scored" if token.scored else quiet]
    return visible(token.text), _STYLES["special"] + (" on green" if token.scored else "") if token.special else style


def visible(text: str) -> str:
    """A token's text with line breaks shown, and control characters, which could move a terminal's cursor, replaced."""
    shown = text.replace("\n", "⏎\n").replace("\t", "⇥")
    return "".join(
        character if character == "\n" or character.isprintable() else f"\\x{ord(character):02x}" for character in shown
    )
