"""The report of a run: one HTML file that needs nothing beside it, made from the files of the run folder."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tether.files import write_whole
from tether.masking import masked
from tether.report.cards import verdict_cards
from tether.report.completions import completions_content
from tether.report.curves import main_charts, more_charts
from tether.report.html import Html, join, tag
from tether.report.read import Run, read_run
from tether.report.sections import config_section, data_section, facts, reference_section, samples_section, section
from tether.report.style import CSS

REPORT = "report.html"
# Even a page that failed to escape something could run no script and load nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(run_folder: Path | str) -> Path:
    """Write `report.html` into a run folder, from whichever of its files exist.

    Reads `metrics.jsonl` (needed), `config.yaml`, `reference.json`, `data.json`, `evaluation.json`, `samples.json`
    and the last table in `completions/`.
    The same files give the same page.

    Args:
        run_folder: the folder that a run wrote.

    Returns:
        Path of the page.

    Raises:
        ConfigError: there are no metrics, or a file is not what its name says.
    """
    folder = Path(run_folder)
    page = render(read_run(folder))
    path = folder / REPORT
    write_whole(path, masked(page))
    return path


def render(run: Run) -> str:
    """The page as text.

    Args:
        run: what was read, see `read_run`.

    Returns:
        A whole HTML document.
    """
    charts = main_charts(run)
    body = (
        _header(run),
        reference_section(run),
        section("Training", tag("div", charts, class_="charts") if charts else None, more_charts(run)),
        samples_section(run),
        section("Completions", completions_content(run.completions)) if run.completions else None,
        data_section(run),
        config_section(run),
        tag("footer", f"Written by Tether {_version()} from the files of the run folder."),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{run.name} · Tether report"),
        tag("style", Html(CSS)),
    )
    return join(Html("<!doctype html>\n"), tag("html", head, tag("body", body), lang="en"), "\n")


def _header(run: Run) -> Html:
    known = facts(run)
    cards = verdict_cards(run)
    return tag(
        "header",
        tag("p", "Preference training", class_="kicker"),
        tag("h1", run.name),
        tag("dl", (tag("div", tag("dt", name), tag("dd", value)) for name, value in known), class_="facts"),
        tag("div", cards, class_="cards") if cards else None,
    )


def _version() -> str:
    try:
        return version("tether")
    except PackageNotFoundError:
        return "(not installed)"
