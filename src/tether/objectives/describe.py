"""The registry of objectives as Markdown, from its rows and the docstrings of their functions.

`python -m tether.objectives.describe docs/choosing_an_objective.md` writes it anew between the marks in that page; a
test fails where the page has drifted.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tether.objectives.objective import Algorithm, Objective
from tether.objectives.registry import OBJECTIVES

BEGIN, END = "<!-- generated: python -m tether.objectives.describe -->", "<!-- end of generated -->"
# Title, kind of data and algorithms of each part of the page.
_PARTS: tuple[tuple[str, str, tuple[Algorithm, ...]], ...] = (
    ("Pairs: a prompt with a chosen and a rejected completion", "pair", ("dpo", "reward")),
    ("Pairs beside a likelihood: the losses of `CPOTrainer` and `ORPOTrainer`", "pair", ("cpo", "orpo")),
    ("Ranked lists: a prompt with several completions, the best first", "ranked", ("dpo",)),
    ("Single completions, each labelled desirable or not", "unpaired", ("kto",)),
    ("Completions to imitate", "completion", ("sft",)),
    ("Completions that the policy samples, judged by rewards", "prompt_only", ("grpo", "rloo")),
)


@dataclass(frozen=True)
class Description:
    """What a function's docstring says.

    Args:
        summary: its first paragraph.
        arguments: name to meaning.
        reference: title, authors and arXiv id.
    """

    summary: str
    arguments: dict[str, str]
    reference: str


def describe(row: Objective) -> Description:
    """Read the docstring of a row's function.

    >>> describe(OBJECTIVES["dpo"]["ipo"]).arguments["beta"]
    "the paper's tau: the difference aimed at is `1 / (2 beta)` nats per token."
    """
    text = inspect.getdoc(row.function) or ""
    sections = re.split(r"\n(?=(?:Args|Returns|Raises|Reference|Example):\n)", text)
    bodies = {head: body for head, _, body in (section.partition(":\n") for section in sections[1:])}
    arguments = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", bodies.get("Args", ""), flags=re.MULTILINE))
    return Description(
        summary=_joined(text.split("\n\n")[0]),
        arguments={name: _joined(meaning) for name, meaning in arguments.items()},
        reference=_joined(bodies.get("Reference", "")),
    )


def every_row() -> list[Objective]:
    """Every row of the registry."""
    return [row for rows in OBJECTIVES.values() for row in rows.values()]


def page() -> str:
    """All kinds of data that have an objective, each with a table and what each objective computes."""
    parts = []
    for title, kind, algorithms in _PARTS:
        rows = [row for row in every_row() if row.kind == kind and row.algorithm in algorithms]
        # A function that two algorithms share is described once.
        parts += [f"## {title}", _overview(rows), *(_details(row) for row in rows if _described(row) is row)]
    return "\n\n".join(parts)


def _described(row: Objective) -> Objective:
    return next(one for one in every_row() if one.function is row.function)


def _overview(rows: list[Objective]) -> str:
    head = ("loss", "reference", "what beta means", "learning rate, LoRA", "full", "when", "paper")
    lines = [_cells(head), _cells(["---"] * len(head))]
    for row in rows:
        said = describe(row)
        paper = re.search(r"arXiv:([\d.]+\d)", said.reference)
        lines.append(
            _cells(
                (
                    f"[`{row.name}`](#{_described(row).name})" + _in_a_run_file(row),
                    "yes" if row.needs_reference else "no",
                    said.arguments.get("beta", "has none").rstrip("."),
                    *row.learning_rate,
                    row.when,
                    f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else "see below",
                )
            )
        )
    return "\n".join(lines)


def _in_a_run_file(row: Objective) -> str:
    if row.run_file_key == row.name:
        return ""
    return f", in a run file `{row.run_file_key}`" if row.run_file_key else ", in Python alone"


def _cells(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _details(row: Objective) -> str:
    said = describe(row)
    lines = [f"### {row.name}", "", said.summary, ""]
    for option in row.options:
        meaning = said.arguments.get(option.name, "").rstrip(".")
        default = "unset: none" if option.default is None else f"default {option.default:g}"
        lines.append(f"- `{option.name}` ({option.allowed.words}; {default}): {meaning}.")
    lines += [f"- Convention: {row.convention}.", f"- Paper: {said.reference}"]
    return "\n".join(lines)


def _joined(text: str) -> str:
    return " ".join(text.split())


def rewritten(text: str) -> str:
    """A page with what lies between its marks written anew.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} and {END}; add these two lines where the table belongs.")
    return f"{before}{BEGIN}\n\n{page()}\n\n{END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(rewritten(target.read_text(encoding="utf-8")), encoding="utf-8")
