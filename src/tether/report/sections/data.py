"""The data as sentences and small charts, with every figure of the audit folded away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from tether.report.cards import title_of
from tether.report.charts import length_strip
from tether.report.numbers import MISSING, as_number, number
from tether.report.read import Run
from tether.report.sections.headline import percent
from tether.report.texts import Limits

_LIST_ITEMS = 12
# What the audit finds in a share of the rows, in its words; what preparation drops is said by its own lines.
_FINDINGS = {
    "broken": "cannot be read",
    "duplicates": "repeat an earlier row",
    "near_duplicates": "almost repeat an earlier row",
    "contradictions": "contradict an earlier row",
    "not_borne_out": "have scores that do not bear out their order",
    "other_script": "are answered in another script",
    "other_language": "are answered in another language",
    "refusals": "prefer a refusal",
    "refusals_rejected": "reject a refusal",
    "openings": "share the most frequent opening",
    "truncated": "would be cut",
}
# Shares below these are in any data.
_USUAL = {"openings": 0.05}


def data_section(run: Run, limits: Limits) -> list[dict[str, Any]]:
    """The data sets of the run, in order.

    Args:
        run: what was read.
        limits: how much may be shown.
    """
    sets = [_set(str(name), part, limits) for name, part in run.data.items() if isinstance(part, dict) and part]
    rest = [(title_of(name), plain(item, limits)) for name, item in run.data.items() if not isinstance(item, dict)]
    more = {"name": "Further", "words": [], "lengths": [], "figures": rest}
    return [*sets, *([more] if rest else [])]


def _set(name: str, part: dict[str, Any], limits: Limits) -> dict[str, Any]:
    figures = {key: value for key, value in part.items() if key != "lines" and (key, value) != ("name", name)}
    return {
        "name": title_of(name),
        "words": [limits.text(line) for line in [*_lines(name, part), *_audit(part.get("audit")), *_overlap(part)]],
        "lengths": _lengths(part.get("lengths")),
        "figures": [(key, limits.text(value)) for key, value in _leaves(figures, limits)],
    }


def _lines(name: str, part: dict[str, Any]) -> list[str]:
    """What was printed when the rows were prepared; of an older run, how many there are."""
    lines = part.get("lines")
    if isinstance(lines, list):
        texts = [str(line).removeprefix(f"{name}: ") for line in lines]
        return [f"{text[:1].upper()}{text[1:]}." for text in texts]
    rows, kept = part.get("rows"), part.get("kept")
    return [f"{number(kept if kept is not None else rows)} of {number(rows)} rows."] if rows is not None else []


def _audit(audit: Any) -> list[str]:
    if not isinstance(audit, dict):
        return []
    rows = number(audit.get("sampled_rows"))
    shares = {name: as_number(audit.get(name)) for name in _FINDINGS}
    found = {name: share for name, share in shares.items() if share > _USUAL.get(name, 0.0)}
    lines = [f"{percent(share)} of {rows} rows {_FINDINGS[name]}." for name, share in found.items()]
    if not lines:
        lines = [f"The audit looked at {rows} rows and found nothing."]
    longer = as_number(audit.get("longer_wins"))
    if longer == longer:
        lines.append(
            f"Of the rows whose completions differ in length, the longer one is the chosen one in {percent(longer)}"
            + (": length alone gives much away." if not 0.35 < longer < 0.65 else ": length gives little away.")
        )
    return lines


def _overlap(part: dict[str, Any]) -> list[str]:
    overlap = part.get("overlap")
    if not isinstance(overlap, dict):
        return []
    rows, prompts = as_number(overlap.get("rows")), as_number(overlap.get("prompts"))
    if not (rows > 0 or prompts > 0):
        return ["No training row, and no prompt of one, is in it."]
    return [f"{number(rows)} training rows are in it word for word, and {number(prompts)} share a prompt with it."]


def _lengths(lengths: Any) -> list[tuple[str, Markup, str]]:
    if not isinstance(lengths, dict):
        return []
    parts = {str(name): part for name, part in lengths.items() if isinstance(part, dict)}
    longest = max((as_number(part.get("max")) for part in parts.values()), default=0.0)
    found = []
    for name, part in parts.items():
        strip = length_strip(part, longest)
        if strip is not None:
            words = f"median {number(part['p50'])} tokens, nine in ten up to {number(part['p90'])}, longest "
            found.append((title_of(name), strip, f"{words}{number(part['max'])}"))
    return found


def _leaves(value: dict[Any, Any], limits: Limits, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Nested mappings as rows, the path of names and the value; a mapping of numbers alone is one row."""
    for key, item in value.items():
        here = (*path, str(key).replace("_", " "))
        if isinstance(item, dict) and any(not isinstance(inner, int | float) for inner in item.values()):
            yield from _leaves(item, limits, here)
        else:
            yield title_of(" · ".join(here)), plain(item, limits)


def plain(value: Any, limits: Limits) -> str:
    """A value of a JSON file as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ({}, []):
        return MISSING
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list):
        shown = ", ".join(plain(item, limits) for item in value[:_LIST_ITEMS])
        return shown + (f" and {number(len(value) - _LIST_ITEMS)} more" if len(value) > _LIST_ITEMS else "")
    if isinstance(value, dict) and all(isinstance(item, int | float) for item in value.values()):
        return (
            ", ".join(f"{str(key).replace('_', ' ')} {plain(item, limits)}" for key, item in value.items() if item)
            or "0"
        )
    return limits.text(json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value))
