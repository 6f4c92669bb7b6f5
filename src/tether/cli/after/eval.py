"""`tether eval RUN|MODEL --data FILE`: how often a model prefers what is preferred, and by how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tether.cli.after.options import (
    AsJson,
    Beta,
    DataFile,
    Dtype,
    First,
    Format,
    MaxTokens,
    Model,
    Reference,
    Split,
    load_pair,
    named_pair,
    print_json,
    source_of,
    watch,
)
from tether.cli.run import Debug

if TYPE_CHECKING:
    from tether.evaluate.accuracy import Evaluation, Preferred
    from tether.evaluate.intervals import Interval

HELP = "Reward accuracy and margins of held-out pairs with intervals, by length and by column; KL to the reference."
EXAMPLE = "Example: tether eval runs/demo --data heldout.jsonl --by source"


def evaluate(
    model: Model,
    data: DataFile,
    reference: Reference = None,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="Also by the values of this column; may be given several times.")
    ] = None,
    beta: Beta = None,
    kl: Annotated[bool, typer.Option("--kl/--no-kl", help="KL of policy and reference at each scored token.")] = True,
    layout: Format = None,
    split: Split = None,
    first: First = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Limit in tokens; left out: the run's.", min=2)
    ] = None,
    max_tokens: MaxTokens = 2048,
    dtype: Dtype = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print accuracy, margins and KL of held-out pairs.

    Raises:
        TetherError: nothing is at the model's name, the rows are no pairs, or a column is missing.
    """
    from tether.cli.output import terminal_output
    from tether.evaluate.accuracy import evaluate_pairs
    from tether.evaluate.scored import Reading, load_for, score_rows

    with terminal_output(debug):
        named = named_pair(model, reference, dtype)
        reading = Reading(max_length=max_length, max_tokens=max_tokens, beta=beta)
        rows = load_for(source_of(data, layout, split, first), reading, by or ())
        policy, other = load_pair(*named)
        scored = score_rows(rows, policy, other, reading, wants_kl=kl, watch=watch)
        found = evaluate_pairs(scored, model, other.named.name if other else None, by or ())
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)


def _print(found: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    against = f" against {found.reference}" if found.reference else ""
    one = found.overall
    used = "" if one.pairs == found.rows else f" of {found.rows:,}"
    lines = [
        f"{found.policy}{against}: {one.pairs:,}{used} pairs",
        f"prefers the chosen completion in {percent(one.accuracy)} of the pairs"
        + (f" ({one.ties} ties count as wrong)" if one.ties else ""),
        f"margin {number(one.margin)}; reward of the chosen {number(found.chosen)}, of the rejected "
        f"{number(found.rejected)}",
        f"rewards: {found.rule}",
        *_kl_lines(found),
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    for column, groups in found.by.items():
        table = Table(column, "pairs", "accuracy", "margin", box=None, pad_edge=False)
        for name, group in groups.items():
            table.add_row(name, f"{group.pairs:,}", *_cells(group))
        console.print()
        console.print(table)


def _kl_lines(found: Evaluation) -> list[str]:
    if found.kl is None:
        return [] if found.reference is None else [f"KL: none, {found.no_kl}"]
    sides = ", ".join(f"{number(value).replace('+', '')} on {name} completions" for name, value in found.kl.items())
    return [f"KL(policy, reference) in nats per token: {sides}"]


def _cells(group: Preferred) -> tuple[str, str]:
    return percent(group.accuracy), number(group.margin)


def percent(share: Interval) -> str:
    """A share with its interval.

    >>> percent((0.5, 0.25, 0.75))
    '50.0 % (25.0 to 75.0)'
    """
    value, low, high = (100 * one for one in share)
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def number(mean: Interval) -> str:
    """A mean with its interval.

    >>> number((0.5, 0.25, 0.75)), number((0.5, float("-inf"), float("inf")))
    ('+0.5 (+0.25 to +0.75)', '+0.5')
    """
    value, low, high = mean
    return f"{value:+.3g}" + (f" ({low:+.3g} to {high:+.3g})" if high != float("inf") else "")
