"""Sampled completions in the report: the last table of the run folder, its best, worst and most divided groups."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from tether.errors import ConfigError
from tether.report.html import Html, join, tag

_FOLDER = "completions"


@dataclass(frozen=True)
class CompletionsFile:
    """A table of completions.

    Args:
        rows: one for each completion.
        rewards: names of the columns that are rewards.
        group: completions of each prompt, one after the other.
    """

    rows: list[dict[str, Any]]
    rewards: list[str]
    group: int

    def groups(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """The groups of the highest and the lowest mean reward, and of the widest rewards; a group comes once."""
        parts = [self.rows[at : at + self.group] for at in range(0, len(self.rows), self.group)]
        sums = [[sum(row[name] or 0.0 for name in self.rewards) for row in part] for part in parts]
        means = [sum(one) / len(one) for one in sums]
        widths = [max(one) - min(one) for one in sums]
        places = range(len(parts))
        found: dict[int, list[str]] = {}
        for said, place in (
            ("highest reward", max(places, key=means.__getitem__)),
            ("lowest reward", min(places, key=means.__getitem__)),
            ("rewards furthest apart", max(places, key=widths.__getitem__)),
        ):
            found.setdefault(place, []).append(said)
        return [(", ".join(said), parts[place]) for place, said in found.items()]


def read_completions(folder: Path) -> CompletionsFile | None:
    """The last table of a run folder; None where there is none.

    Raises:
        ConfigError: the file is no table of completions.
    """
    paths = sorted((folder / _FOLDER).glob("completions_*.parquet"), key=lambda path: (len(path.name), path.name))
    if not paths:
        return None
    try:
        table = parquet.read_table(paths[-1])
        about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        rewards, group = json.loads(about["rewards"]), int(about["group"])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        raise ConfigError(
            f"{paths[-1]} is no table of completions that Tether wrote ({error}). Remove it: the page does without."
        ) from error
    return CompletionsFile(table.to_pylist(), rewards, group) if table.num_rows else None


def completions_content(found: CompletionsFile) -> Html:
    """Some groups, each as a table; all text escaped."""
    names = ("completion", *found.rewards, "advantage")
    head = tag("thead", tag("tr", (tag("th", name, scope="col", class_="value") for name in names)))
    parts = [tag("p", f"Of the last rollout that was logged, step {found.rows[0]['step']}; by the sum of the rewards.")]
    for said, rows in found.groups():
        body = tag("tbody", (_row(row, found.rewards) for row in rows))
        parts.append(tag("h3", said))
        parts.append(tag("pre", _text(rows[0]["prompt"])))
        parts.append(tag("div", tag("table", head, body), class_="scroll"))
    return join(parts)


def _row(row: dict[str, Any], rewards: list[str]) -> Html:
    figures = ("-" if row[name] is None else f"{row[name]:.3g}" for name in (*rewards, "advantage"))
    return tag(
        "tr", tag("td", _text(row["completion"]), class_="value long"), (tag("td", f, class_="value") for f in figures)
    )


def _text(said: Any) -> str:
    if isinstance(said, list):
        return "\n\n".join(f"{one.get('role', '')}: {one.get('content', '')}" for one in said)
    return str(said)
