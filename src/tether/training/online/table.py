"""The table of completions: in the terminal, and as Parquet in the run folder, for each training log."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tether.errors import RewardError
from tether.progress import console

FOLDER = "completions"
# Columns of the table itself, which no reward function and no `log_extra` may take.
_OWN = ("step", "prompt", "completion", "advantage")


@dataclass(frozen=True)
class Completions:
    """What the table says of a rollout's K completions, of all processes.

    Args:
        prompts: texts or messages.
        completions: the same.
        rewards: by function, None for not applicable.
        advantages: K.
        extras: further columns, which reward functions logged.
        group: completions of each prompt, one after the other.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    rewards: Mapping[str, Sequence[float | None]]
    advantages: Sequence[float]
    extras: Mapping[str, Sequence[Any]]
    group: int = 1

    def __post_init__(self) -> None:
        for name, values in self.extras.items():
            if len(values) != len(self.prompts):
                raise RewardError(
                    f"log_extra({name!r}) had {len(values)} values for {len(self.prompts)} completions; give one each."
                )
            if name in (*_OWN, *self.rewards):
                raise RewardError(f"log_extra({name!r}) is the name of another column; take another name.")

    def columns(self, step: int) -> dict[str, list[Any]]:
        """TRL's columns, in its order."""
        return {
            "step": [step] * len(self.prompts),
            "prompt": list(self.prompts),
            "completion": list(self.completions),
            **{name: list(values) for name, values in self.rewards.items()},
            **{name: list(values) for name, values in self.extras.items()},
            "advantage": list(self.advantages),
        }


class CompletionsTable(TrainerCallback):
    """Prints and writes the last rollout's completions with each training log.

    Args:
        last: gives them; None where none were sampled yet.
        folder: of the run.
        shown: how many are printed, drawn by the step; None: all.
        unique: one of each prompt is printed.
    """

    def __init__(self, last: Any, folder: Path, shown: int | None, unique: bool = False) -> None:
        self._last, self._folder, self._shown, self._unique = last, folder / FOLDER, shown, unique

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """One file, and one table."""
        found: Completions | None = self._last()
        if found is None or "loss" not in (kwargs.get("logs") or {}) or not state.is_world_process_zero:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"completions_{state.global_step:05d}.parquet"
        whole = path.with_suffix(".unfinished")
        about = {"rewards": json.dumps(list(found.rewards)), "group": str(found.group)}
        parquet.write_table(pa.table(found.columns(state.global_step)).replace_schema_metadata(about), whole)
        whole.replace(path)
        table = as_table(found, state.global_step, self._shown, unique=self._unique)
        if table is not None:
            console().print(table)


def as_table(found: Completions, step: int, shown: int | None = None, *, unique: bool = False) -> Panel | None:
    """For a terminal; text is shown as it is, without markup.

    Args:
        found: the completions.
        step: in the title; which are drawn is a function of it.
        shown: the most rows; None: all; 0: no table.
        unique: of each prompt the first completion alone may be one of them.
    """
    places = list(range(len(found.prompts)))
    if unique:
        # From the back, so that the first stays.
        places = sorted({text_of(found.prompts[k]): k for k in reversed(places)}.values())
    if shown is not None and shown < len(places):
        places = sorted(random.Random(step).sample(places, shown))
    if not places:
        return None
    table = Table(expand=True, show_lines=True)
    for name in ("Prompt", "Completion"):
        table.add_column(name)
    for name in (*found.rewards, "Advantage"):
        table.add_column(Text(name), justify="right")
    for name in found.extras:
        table.add_column(Text(name))
    for k in places:
        rewards = [values[k] for values in found.rewards.values()]
        figures = ["-" if value is None else f"{value:.2f}" for value in (*rewards, found.advantages[k])]
        texts = [text_of(found.prompts[k]), text_of(found.completions[k])]
        table.add_row(*map(Text, (*texts, *figures, *(str(values[k]) for values in found.extras.values()))))
    return Panel(table, title=f"Step {step}", expand=False)


def text_of(said: Any) -> str:
    """A text as it is, messages one after the other with their roles."""
    if not isinstance(said, (list, tuple)):
        return str(said)
    return "\n\n".join(f"{one.get('role', '')}: {one.get('content', '')}" for one in said)
