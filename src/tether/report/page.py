"""The report of a run: one HTML file that needs nothing beside it, made from the files of the run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tether.errors import ConfigError
from tether.files import write_whole
from tether.redact import masked
from tether.report.cards import verdict_cards
from tether.report.curves import charts_of
from tether.report.read import Run, read_run
from tether.report.render import page
from tether.report.sections.completions import completions_content
from tether.report.sections.data import data_section
from tether.report.sections.headline import facts, headline
from tether.report.sections.pairs import pairs_section
from tether.report.sections.reference import reference_section
from tether.report.texts import Limits, sample_of

REPORT = "report.html"
LARGEST_PAGE = 2_000_000
_OPEN_CONFIG_LINES = 60


def write_report(run_folder: Path | str, path: Path | str | None = None) -> Path:
    """Write the page of a run, from whichever of its files exist; also while the run goes on.

    Reads `metrics.jsonl` (needed), `config.yaml`, `reference.json`, `data.json`, `evaluation.json`, `samples.json`,
    `pairs.json`, `health.jsonl` and the last table in `completions/`.
    The same files give the same page, of at most 2 MB: of what has no natural end, as much is shown as fits.

    Args:
        run_folder: the folder that a run wrote.
        path: of the page; None for `report.html` in that folder.

    Returns:
        Path of the page.

    Raises:
        ConfigError: there are no metrics, a file is not what its name says, or there is no folder for the page.
    """
    folder = Path(run_folder)
    page_path = folder / REPORT if path is None else Path(path)
    write_page(page_path, render(read_run(folder)))
    return page_path


def render(run: Run) -> str:
    """The page as text.

    Args:
        run: what was read, see `read_run`.

    Returns:
        A whole HTML document.
    """
    whole = {
        "headline": headline(run),
        "cards": verdict_cards(run),
        "charts": charts_of(run, first=True),
        "more": charts_of(run, first=False),
        "reference": reference_section(run),
    }
    title = f"{run.name} · Tether report"
    return small_enough(lambda limits: page("report.html", title, **whole, **_limited(run, limits)))


def small_enough(made: Callable[[Limits], str]) -> str:
    """The page with as much of the long texts as fits its size."""
    limits = Limits()
    text = made(limits)
    while len(text.encode("utf-8", "replace")) > LARGEST_PAGE and limits != limits.tighter():
        limits = limits.tighter()
        text = made(limits)
    return text


def write_page(path: Path, text: str) -> None:
    """Write a page at once and without secrets: who has the old one open, or a killed run, never sees half of it."""
    if not path.parent.is_dir():
        raise ConfigError(
            f"Got '{path}' for the page, and there is no folder '{path.parent}'. Make it, or name another."
        )
    write_whole(path, masked(text))


def _limited(run: Run, limits: Limits) -> dict[str, Any]:
    return {
        "name": run.name,
        "facts": [(name, limits.text(value)) for name, value in facts(run)],
        "health": health_lines(run, limits),
        "pairs": pairs_section(run, limits),
        "samples": [sample_of(row, limits) for row in run.samples[: limits.rows]],
        "samples_left_out": max(len(run.samples) - limits.rows, 0),
        "completions": completions_content(run.completions, limits) if run.completions else None,
        "data": data_section(run, limits),
        "config": _config(run, limits),
    }


def health_lines(run: Run, limits: Limits) -> list[dict[str, Any]]:
    """What was said of the run's health while it trained, each thing once, at its first step."""
    first: dict[str, dict[str, Any]] = {}
    for line in run.health:
        name = str(line.get("name", ""))
        first.setdefault(name, {"name": name, "step": line.get("step"), "line": limits.text(str(line.get("line", "")))})
    # That a first loss is 0 startles on the terminal; on the page the curve says more.
    return [line for line in first.values() if line["name"] != "no-loss"]


def _config(run: Run, limits: Limits) -> dict[str, Any] | None:
    if not run.config_text:
        return None
    text = run.config_text.rstrip()
    shown = text if len(text) <= limits.config else f"{text[: limits.config]}\n# … the rest is in config.yaml"
    return {"text": shown, "open": text.count("\n") < _OPEN_CONFIG_LINES}
