"""Sampled completions in the report: the last table of the run folder, its best, worst and most divided groups."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from tether.errors import ConfigError
from tether.report.texts import Limits, plain_text

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
            f"{paths[-1]} is not a table of completions that Tether wrote ({error}). Remove it: the page does without."
        ) from error
    return CompletionsFile(table.to_pylist(), rewards, group) if table.num_rows else None


def completions_content(found: CompletionsFile, limits: Limits) -> dict[str, Any]:
    """Some groups, each as a table.

    Args:
        found: the table.
        limits: how much may be shown.
    """
    columns = ("completion", *found.rewards, "advantage")
    groups = [
        {
            "why": said,
            "prompt": limits.text(plain_text(rows[0]["prompt"])),
            "rows": [_row(row, found.rewards, limits) for row in rows[: limits.rows]],
            "left_out": max(len(rows) - limits.rows, 0),
        }
        for said, rows in found.groups()
    ]
    words = f"Of the last rollout that was logged, step {found.rows[0]['step']}; by the sum of the rewards."
    return {"words": words, "columns": columns, "groups": groups}


def _row(row: dict[str, Any], rewards: list[str], limits: Limits) -> tuple[str, list[str]]:
    figures = ["-" if row[name] is None else f"{row[name]:.3g}" for name in (*rewards, "advantage")]
    return limits.text(plain_text(row["completion"])), figures
