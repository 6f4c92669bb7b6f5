"""What is asked and what is refused of each tool's files, as tables of the documentation."""

from __future__ import annotations

from tether.config.foreign.convert import TOOLS
from tether.config.foreign.table import MARKS, Row


def table_of_stops(name: str) -> str:
    """Keys of a tool that stop a conversion, with what they may be and why, as a Markdown table.

    Args:
        name: of the tool, a key of `TOOLS`.
    """
    groups: dict[tuple[str, tuple[object, ...]], list[Row]] = {}
    for row in TOOLS[name].rows().values():
        if row.mark in ("ask", "refused"):
            groups.setdefault((row.reason, row.idle), []).append(row)
    lines = ["| key | may be | otherwise |", "|---|---|---|"]
    for (reason, idle), rows in groups.items():
        keys = ", ".join(f"`{row.key}`" for row in rows)
        may = ", ".join(f"`{_written(value)}`" for value in idle) or "empty"
        lines.append(f"| {keys} | {may} | {'asked: ' if rows[0].mark == 'ask' else ''}{reason} |")
    return "\n".join(lines)


def counts(name: str) -> str:
    """How many keys of a tool have each mark."""
    rows = TOOLS[name].rows().values()
    return ", ".join(f"{sum(row.mark == mark for row in rows)} {mark}" for mark in MARKS)


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
