"""What `tether data --html` writes: pages that need nothing beside them; all text from data is escaped (INV-39)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice, pairwise, repeat
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tether.cli.data.tables import notes
from tether.data.audit.audit import FINDINGS
from tether.report.charts import Values, histogram
from tether.report.render import page

if TYPE_CHECKING:
    from tether.data.audit.audit import Check
    from tether.data.show import Token

# Lengths that a chart is drawn of.
_DRAWN = 200_000


def check_page(found: Sequence[Check], over: Sequence[str]) -> str:
    """The audit as a page, with histograms.

    Args:
        found: of each set.
        over: limits that were passed, in words.

    Returns:
        A whole HTML document.
    """
    return page("check.html", "Data check · Tether", over=over, sets=[_set(one) for one in found])


def tokens_page(rows: Sequence[list[list[Token]]], number: int) -> str:
    """Tokens as a page.

    Args:
        rows: for each prepared row, the prompt's tokens and each completion's.
        number: of the row, from 1.

    Returns:
        A whole HTML document.
    """
    parts = []
    for row in rows:
        for place, tokens in enumerate(row):
            scored = sum(token.scored for token in tokens)
            title = f"Completion {place}" if place else "Prompt"
            title += f": {scored} of {len(tokens)} tokens scored" if place or scored else ""
            pieces = [piece for before, token in pairwise([None, *tokens]) for piece in _with_role(before, token)]
            parts.append({"title": title, "pieces": pieces, "is_prompt": not place})
    return page("row.html", f"Row {number} · Tether", number=number, parts=parts)


def _lengths(part: str, sizes: Counter[int]) -> Markup | None:
    """How often there are which lengths; of very many rows, of an even part of them."""
    every = -(-sizes.total() // _DRAWN)
    title = f"{part}: characters" + (f" (one row in {every:,})" if every > 1 else "")
    ordered = chain.from_iterable(repeat(size, sizes[size]) for size in sorted(sizes))
    return histogram(title, [Values("", list(islice(ordered, 0, None, every)))])


def _set(found: Check) -> dict[str, Any]:
    charts = [_lengths(part, sizes) for part, sizes in found.characters.items()]
    if found.lengths is not None:
        totals = [Values("", found.lengths.totals)]
        charts.append(histogram("prompt and longest completion: tokens", totals))
    limits = found.lengths.limits if found.lengths is not None else {}
    return {
        "name": found.name,
        "looked": f"{found.rows:,} of {found.total:,} rows, {found.kind}",
        "findings": [
            (FINDINGS[name], f"{one.count:,}", f"{one.share:.2%}", ", ".join(map(str, one.rows)))
            for name, one in found.findings.items()
        ],
        "notes": [*found.faults, *notes(found)],
        # What several limits would cut.
        "limits": [(f"{limit:,}", f"{one.cut:.1%}", f"{one.dropped:.1%}") for limit, one in limits.items()],
        "charts": [chart for chart in charts if chart is not None],
    }


def _with_role(before: Token | None, token: Token | None) -> list[tuple[str, str, str]]:
    """A token as class, text and what the pointer shows, after the name of who says it where that is another."""
    if token is None:
        return []
    changed = token.role and (before is None or before.role != token.role)
    return [*([("role", f"\n{token.role}: ", "")] if changed else []), _token(token)]


def _token(token: Token) -> tuple[str, str, str]:
    kind = "s" if token.scored else "p" if token.part == "prompt" else "u"
    title = f"id {token.id}" + (f", {token.role}" if token.role else "")
    return f"{kind} x" if token.special else kind, token.text.replace("\n", "⏎\n"), title
