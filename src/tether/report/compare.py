"""Several runs on one page: how they ended, what was set differently, and their curves over one another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tether.errors import ConfigError
from tether.report.curves import compared_charts, evaluation_sets
from tether.report.numbers import MISSING, as_number, duration, number
from tether.report.page import health_lines, small_enough, write_page
from tether.report.read import Run, read_run
from tether.report.render import page
from tether.report.sections.headline import percent
from tether.report.texts import Limits

# Keys that differ between any two runs and say nothing.
_OWN_KEYS = ("output",)


def write_comparison(run_folders: Sequence[Path | str], path: Path | str) -> Path:
    """Write a page that compares runs.

    Args:
        run_folders: at least two folders that runs wrote; a run may still be going on.
        path: of the page.

    Returns:
        The path.

    Raises:
        ConfigError: fewer than two, one twice, or one that cannot be read.
    """
    write_page(Path(path), compare(read_runs(run_folders)))
    return Path(path)


def read_runs(run_folders: Sequence[Path | str]) -> list[Run]:
    """The runs to compare, told apart by as much of their paths as it takes.

    Raises:
        ConfigError: see `write_comparison`.
    """
    folders = [Path(folder).resolve() for folder in run_folders]
    if len(folders) < 2 or len(set(folders)) < len(folders):
        raise ConfigError(
            f"Got {len(folders)} run folders of which {len(set(folders))} differ; a comparison needs at least two that "
            "do. Name each run once."
        )
    names = _names(folders)
    runs = [read_run(folder) for folder in folders]
    return [Run(**{**vars(run), "name": name}) for run, name in zip(runs, names, strict=True)]


def compare(runs: Sequence[Run]) -> str:
    """The page as text.

    Args:
        runs: what was read of each, at least two.

    Returns:
        A whole HTML document.
    """
    shown = [{"name": run.name, "style": f"run{place % 8}"} for place, run in enumerate(runs)]
    charts, words = compared_charts(runs), [_headline(runs)]
    title = f"{' · '.join(run.name for run in runs)} · Tether"

    def made(limits: Limits) -> str:
        return page(
            "comparison.html",
            title,
            runs=shown,
            headline=words,
            figures=_figures(runs),
            differences=[(key, [limits.text(value) for value in values]) for key, values in _differences(runs)],
            charts=charts,
            health=[(run.name, line) for run in runs for line in health_lines(run, limits)],
        )

    return small_enough(made)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as tell them apart."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _accuracy(run: Run) -> tuple[float, float, float]:
    """Held-out accuracy and its interval; NaN for what is not known."""
    result = run.evaluation.get("reward_accuracy")
    if isinstance(result, dict):
        return tuple(as_number(result.get(key)) for key in ("value", "low", "high"))  # type: ignore[return-value]
    prefix = _prefix(run)
    return run.last(f"{prefix}rewards/accuracies"), math.nan, math.nan


def _prefix(run: Run) -> str:
    name = next(iter(evaluation_sets(run.metrics)), "")
    return f"eval_{name}_" if name else "eval_"


def _headline(runs: Sequence[Run]) -> str:
    known = [(run.name, *_accuracy(run)) for run in runs]
    known = sorted((one for one in known if math.isfinite(one[1])), key=lambda one: -one[1])
    if len(known) < 2:
        return "Fewer than two of the runs have been evaluated on held-out pairs; the curves below are of training."
    (best, value, low, _), (second, other, _, high) = known[0], known[1]
    if value == other:
        return f"{best} and {second} have the same held-out accuracy, {percent(value)}, the highest."
    said = f"{best} has the highest held-out accuracy, {percent(value)}, before {second} with {percent(other)}"
    if not math.isfinite(low + high):
        return f"{said}; without intervals nothing tells them apart from chance."
    return f"{said}; their 95 % intervals {'do not overlap' if low > high else 'overlap'}."


def _figures(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Names of figures, each with every run's; those that no run has are left out."""
    rows = []
    for run in runs:
        value, low, high = _accuracy(run)
        prefix = _prefix(run)
        interval = f" ({number(low, 3)} to {number(high, 3)})" if math.isfinite(low + high) else ""
        rows.append(
            {
                "Held-out accuracy": f"{number(value, 3)}{interval}" if math.isfinite(value) else MISSING,
                "Held-out loss": number(run.last(f"{prefix}loss")),
                "Held-out margin": number(run.last(f"{prefix}rewards/margins")),
                "Training loss": number(run.last("loss")),
                "Training margin": number(run.last("rewards/margins")),
                "Sampled reward": number(run.last("reward")),
                "Steps": number(run.steps),
                "Tokens": number(run.last("num_tokens")),
                "Time": duration(run.last("train_runtime")),
                "Memory, GiB": number(run.last("memory_peak_gib")),
            }
        )
    table = [(name, [row[name] for row in rows]) for name in rows[0]]
    return [(name, figures) for name, figures in table if set(figures) != {MISSING}]


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys of the configurations whose values differ, with each run's."""
    settings = [dict(_leaves(run.config)) for run in runs]
    keys = sorted({key for one in settings for key in one} - set(_OWN_KEYS))
    rows = [(key, [one.get(key, MISSING) for one in settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _leaves(config: dict[Any, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, str(key)))
        else:
            yield ".".join((*path, str(key))), str(value)
