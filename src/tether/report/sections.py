"""The sections of the page: the reference in words, the data, the texts, the configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tether.report.cards import title_of
from tether.report.html import Html, join, tag
from tether.report.numbers import MISSING, as_number, duration, number, signed
from tether.report.read import Run

_MEANINGS = {
    "start": "the policy as it was before the first update",
    "base": "the model's weights without any adapter",
    "model": "another model that was named",
    "adapter": "an adapter that was named",
    "none": "nothing: this objective needs no reference",
}
_METHODS = {
    "adapter_off": "the policy itself with its adapter switched off, which was checked to equal the start",
    "snapshot": "the policy itself with its trainable tensors swapped for a copy kept from the start",
    "model": "a second model",
    "store": "log-probabilities read from disk",
    "remote": "a server",
}
_SHOWN_SAMPLES = 6
_LIST_ITEMS = 12
_CONFIG_LINES = 60
_NOTHING = {MISSING, "0", "0, 0", "no"}


def section(title: str, *content: Html | None) -> Html | None:
    """A section with a heading.

    Args:
        title: the heading.
        content: what it holds; None is left out.

    Returns:
        The section; None when nothing is left.
    """
    kept = [part for part in content if part]
    return tag("section", tag("h2", title), kept) if kept else None


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run, in a few words each, for the header.

    Args:
        run: what was read.

    Returns:
        Names and values; what is not known is left out.
    """
    config = run.config
    model, objective, lora = (config.get(key) for key in ("model", "objective", "lora"))
    if isinstance(model, dict):
        model = next((model[key] for key in ("name", "path", "source") if model.get(key)), None)
    objective = objective if isinstance(objective, dict) else {}
    loss = objective.get("loss")
    beta = f", β {number(objective['beta'])}" if "beta" in objective else ""
    steps = max((as_number(line.get("step")) for line in run.metrics if "step" in line), default=float("nan"))
    found = [
        ("Model", str(model) if model else ""),
        ("Objective", f"{', '.join(map(str, loss)) if isinstance(loss, list) else loss}{beta}" if loss else ""),
        ("Trained", f"LoRA, r {lora['r']}" if isinstance(lora, dict) and "r" in lora else ""),
        ("Steps", number(steps)),
        ("Epochs", number(run.last("epoch"))),
        ("Tokens", number(run.last("num_tokens"))),
        ("Time", duration(run.last("train_runtime"))),
    ]
    return [(name, value) for name, value in found if value and value != MISSING]


def reference_section(run: Run) -> Html | None:
    """What the reference was, how it was computed, and what the guard found, in sentences and in a table.

    Args:
        run: what was read.

    Returns:
        The section; None without `reference.json`.
    """
    identity, guard = run.reference.get("identity"), run.reference.get("guard")
    if not isinstance(identity, dict):
        return None
    meaning, method = identity.get("meaning"), identity.get("method")
    words = [f"The reference is {_MEANINGS.get(str(meaning), str(meaning))}."]
    if meaning != "none":
        words.append(f"Its log-probabilities come from {_METHODS.get(str(method), str(method))}.")
    if isinstance(guard, dict):
        passed = guard.get("passed")
        words.append(
            f"Before the first update, policy and reference scored the same {number(guard.get('rows'))} rows; the "
            f"log-probability of a token differed by at most {number(guard.get('max_difference'))} nats, where "
            f"{number(guard.get('tolerance'))} is allowed: the guard {'passed' if passed else 'did not pass'}."
        )
    elif meaning == "start":
        words.append("No comparison of the two before the first update is on record, as after resuming a run.")
    elif meaning != "none":
        words.append("The policy does not start at this reference, so the two were not compared.")
    rows = [(title_of(key), "" if value is None else str(value)) for key, value in identity.items()]
    table = tag("dl", ((join(tag("dt", key), tag("dd", value))) for key, value in rows if value), class_="identity")
    line = run.reference.get("line")
    printed = tag("p", tag("code", str(line)), class_="note") if line else None
    return section("The reference", tag("p", " ".join(words), class_="lead"), table, printed)


def data_section(run: Run) -> Html | None:
    """The audit of the data as a table, one column for each set.

    Args:
        run: what was read.

    Returns:
        The section; None without `data.json`.
    """
    sets = {
        name: dict(_leaves(_unnamed(part, name))) for name, part in run.data.items() if isinstance(part, dict) and part
    }
    rest = {name: value for name, value in run.data.items() if not isinstance(value, dict)}
    keys = list(dict.fromkeys(key for leaves in sets.values() for key in leaves))
    rows = {key: [leaves.get(key, MISSING) for leaves in sets.values()] for key in keys}
    quiet = {key: values for key, values in rows.items() if set(values) <= _NOTHING}
    telling = {key: values for key, values in rows.items() if key not in quiet}
    blocks = [_table(list(sets), telling), _table([], {title_of(name): [_plain(item)] for name, item in rest.items()})]
    if quiet:
        blocks.append(tag("details", tag("summary", f"{len(quiet)} that are zero or empty"), _table(list(sets), quiet)))
    return section("The data", *blocks)


def samples_section(run: Run) -> Html | None:
    """Texts of the policy before and after training, side by side.

    Args:
        run: what was read.

    Returns:
        The section; None without `samples.json`.
    """
    samples = [_sample(row) for row in run.samples]
    shown, folded = samples[:_SHOWN_SAMPLES], samples[_SHOWN_SAMPLES:]
    more = tag("details", tag("summary", f"{len(folded)} more"), folded) if folded else None
    return section("Before and after", *shown, more)


def config_section(run: Run) -> Html | None:
    """The resolved run file as it was written.

    Args:
        run: what was read.

    Returns:
        The section; None without `config.yaml`.
    """
    if not run.config_text:
        return None
    text = run.config_text.rstrip()
    unfolded = "" if text.count("\n") < _CONFIG_LINES else None
    body = tag("pre", tag("code", text))
    return section("Configuration", tag("details", tag("summary", "config.yaml, resolved"), body, open=unfolded))


def _table(columns: list[str], rows: dict[str, list[str]]) -> Html | None:
    if not rows:
        return None
    names = (tag("th", title_of(name), scope="col", class_="value") for name in columns)
    head = tag("thead", tag("tr", tag("th", ""), names)) if columns else None
    body = tag("tbody", (_row(name, values) for name, values in rows.items()))
    return tag("div", tag("table", head, body), class_="scroll")


def _row(name: str, values: list[str]) -> Html:
    cells = (tag("td", value, class_="value" if len(value) < 24 else "value long") for value in values)
    return tag("tr", tag("th", name, scope="row"), cells)


def _unnamed(part: dict[Any, Any], name: str) -> dict[Any, Any]:
    """Without the set's own name, which heads its column already."""
    return {key: value for key, value in part.items() if (key, value) != ("name", name)}


def _leaves(value: dict[Any, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Nested mappings as rows, the path of names and the value; a mapping of numbers alone is one row."""
    for key, item in value.items():
        here = (*path, str(key).replace("_", " "))
        if isinstance(item, dict) and any(not isinstance(inner, int | float) for inner in item.values()):
            yield from _leaves(item, here)
        else:
            yield title_of(" · ".join(here)), _plain(item)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ({}, []):
        return MISSING
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list):
        shown = ", ".join(_plain(item) for item in value[:_LIST_ITEMS])
        return shown + (f" and {number(len(value) - _LIST_ITEMS)} more" if len(value) > _LIST_ITEMS else "")
    if isinstance(value, dict) and all(isinstance(item, int | float) for item in value.values()):
        return ", ".join(f"{str(key).replace('_', ' ')} {_plain(item)}" for key, item in value.items() if item) or "0"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _text(value: Any) -> Html | str:
    """A prompt or completion: text as it is, chat messages with their roles."""
    if isinstance(value, str):
        # A completion starts with the space that parts it from its prompt.
        return value.strip()
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return join(_message(message) for message in value)
    return _plain(value)


def _message(message: dict[str, Any]) -> Html:
    role = tag("span", str(message.get("role", "")), class_="role")
    return join(role, _plain(message.get("content")), tag("br"))


def _sample(row: dict[str, Any]) -> Html:
    before, after = as_number(row.get("score_before")), as_number(row.get("score_after"))

    def side(title: str, text: Any, score: float, change: str | None) -> Html:
        chips = None
        if score == score:
            chips = join(
                tag("span", number(score, 2), class_="score"), tag("span", change, class_="delta") if change else None
            )
        return tag("div", tag("h3", title, chips), tag("p", _text(text), class_="quote", dir="auto"))

    change = signed(after - before, 2) if before == before and after == after else None
    return tag(
        "article",
        tag("p", _text(row.get("prompt", "")), class_="prompt", dir="auto"),
        tag(
            "div",
            side("Before", row.get("before", ""), before, None),
            side("After", row.get("after", ""), after, change),
            class_="sides",
        ),
    )
