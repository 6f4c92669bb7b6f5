"""What `tether data --html` writes: pages that need nothing beside them; all text from data is escaped (INV-39)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from tether.cli.data_tables import notes
from tether.data.audit.audit import FINDINGS
from tether.report.charts import histogram
from tether.report.html import Html, join, tag
from tether.report.style import CSS

if TYPE_CHECKING:
    from tether.data.audit.audit import Check
    from tether.data.show import Token

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_TOKENS = """
.tokens { line-height: 2.1; white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
.tokens span { border-radius: 3px; padding: 0.1rem 0.05rem; border-bottom: 2px solid transparent; }
.tokens .p { border-color: #6aa6d8; } .tokens .s { background: #9fd8a455; border-color: #3f9c4b; }
.tokens .u { opacity: 0.6; border-color: #b9b9b9; } .tokens .x { font-weight: 700; color: #a03ac0; }
.tokens .role { color: #8a7a1f; font-weight: 600; }
.boundary { color: #d0582f; font-weight: 700; }
"""


def check_page(found: Sequence[Check], over: Sequence[str]) -> str:
    """The audit as a page, with histograms.

    Args:
        found: of each set.
        over: limits that were passed, in words.

    Returns:
        A whole HTML document.
    """
    passed = tag("ul", (tag("li", line) for line in over), class_="over") if over else None
    return _page("Data check", tag("h1", "Data check"), passed, *map(_section, found))


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
            end = tag("span", "▌", class_="boundary", title="end of the prompt") if not place else None
            pieces = (piece for before, token in pairwise([None, *tokens]) for piece in _with_role(before, token))
            parts += [tag("h2", title), tag("p", pieces, end, class_="tokens")]
    legend = tag(
        "p",
        (
            tag("span", words, class_=kind)
            for kind, words in (
                ("p", "prompt"),
                ("s", "scored"),
                ("u", "not scored"),
                ("x", "special"),
                ("role", "role:"),
            )
        ),
        class_="tokens",
    )
    return _page(f"Row {number}", tag("h1", f"Row {number}"), legend, *parts)


def _page(title: str, *body: Html | None) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} · Tether"),
        tag("style", Html(CSS + _TOKENS)),
    )
    return join(Html("<!doctype html>\n"), tag("html", head, tag("body", *body), lang="en"), "\n")


def _section(found: Check) -> Html:
    looked = f"{found.rows:,} of {found.total:,} rows, {found.kind}"
    heading = tag("thead", tag("tr", (tag("th", word) for word in ("Rows that …", "Rows", "Share", "First rows"))))
    body = tag(
        "tbody",
        (
            tag(
                "tr",
                tag("th", FINDINGS[name]),
                tag("td", f"{one.count:,}", class_="value"),
                tag("td", f"{one.share:.2%}", class_="value"),
                tag("td", ", ".join(map(str, one.rows))),
            )
            for name, one in found.findings.items()
        ),
    )
    charts = [histogram(f"{part}: characters", values) for part, values in found.characters.items()]
    if found.lengths is not None:
        charts.append(histogram("prompt and longest completion: tokens", found.lengths.totals))
    return tag(
        "section",
        tag("h2", found.name),
        tag("p", looked, class_="note"),
        tag("table", heading, body),
        tag("ul", (tag("li", line) for line in (*found.faults, *notes(found)))),
        _limits(found) if found.lengths is not None else None,
        tag("div", charts, class_="charts"),
    )


def _limits(found: Check) -> Html:
    """What several limits would cut, as a table."""
    limits = found.lengths.limits if found.lengths is not None else {}
    rows = (
        tag(
            "tr",
            tag("th", f"{limit:,}"),
            tag("td", f"{one.cut:.1%}", class_="value"),
            tag("td", f"{one.dropped:.1%}", class_="value"),
        )
        for limit, one in limits.items()
    )
    heading = tag("thead", tag("tr", (tag("th", word) for word in ("max_length", "Cut", "Dropped"))))
    return tag("table", heading, tag("tbody", rows))


def _with_role(before: Token | None, token: Token | None) -> list[Html]:
    """A token, after the name of who says it where that is another than before."""
    if token is None:
        return []
    changed = token.role and (before is None or before.role != token.role)
    return [*([tag("span", f"\n{token.role}: ", class_="role")] if changed else []), _token(token)]


def _token(token: Token) -> Html:
    kind = "s" if token.scored else "p" if token.part == "prompt" else "u"
    shown = token.text.replace("\n", "⏎\n")
    title = f"id {token.id}" + (f", {token.role}" if token.role else "")
    return tag("span", shown, class_=f"{kind} x" if token.special else kind, title=title)
