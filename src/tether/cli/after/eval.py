"""`tether eval RUN|MODEL --data FILE`: how often a model prefers what is preferred, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.cli.after.compare import MaxNew, Seed, Temperature
from tether.cli.after.judge import Judged
from tether.cli.after.options import (
    Beta,
    DataFile,
    Dtype,
    First,
    Format,
    MaxLength,
    MaxTokens,
    Model,
    Reference,
    Split,
    load_pair,
    named_pair,
    print_json,
    source_of,
)
from tether.cli.run import AsJson, Debug
from tether.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

    from tether.evaluate.accuracy import Evaluation, Preferred
    from tether.evaluate.answers.sampling import Generation
    from tether.evaluate.answers.win_rate import WinRate
    from tether.evaluate.intervals import Interval
    from tether.evaluate.named_models import Loaded, NamedModel
    from tether.evaluate.score_rows import Reading

# Sums of log-probs fall with every token: from this share on they tell lengths apart, and nothing else is known.
_BY_LENGTH = 0.95
HELP = "Reward accuracy and margins of held-out pairs with intervals, by length and by column; KL; win rate by a judge."


def evaluate(
    model: Model,
    data: DataFile,
    reference: Reference = None,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="Also by the values of this column; may be given several times.")
    ] = None,
    beta: Beta = None,
    kl: Annotated[bool, typer.Option("--kl/--no-kl", help="KL of policy and reference at each scored token.")] = True,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Also the win rate over the reference, by a server's address, FILE.py:FUNCTION or a reward model.",
            metavar="URL|FILE.py:NAME|MODEL",
        ),
    ] = None,
    judge_model: Annotated[str | None, typer.Option("--judge-model", help="Name that the server knows it by.")] = None,
    judge_key: Annotated[
        str | None, typer.Option("--judge-key-env", help="Environment variable with the server's key.")
    ] = None,
    max_new_tokens: MaxNew = 128,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
    layout: Format = None,
    split: Split = None,
    first: First = None,
    max_length: MaxLength = None,
    max_tokens: MaxTokens = 2048,
    dtype: Dtype = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print accuracy, margins and KL of held-out pairs, and the win rate on their prompts.

    Raises:
        TetherError: nothing is at the model's name, the rows do not fit, or a column is missing.
    """
    from tether.cli.output import terminal_output
    from tether.evaluate.answers.sampling import Generation
    from tether.evaluate.score_rows import Reading

    judged = None if judge is None else Judged(judge, judge_model, judge_key)
    if judged is None and (judge_model or judge_key):
        raise ConfigError("--judge-model and --judge-key-env belong to --judge, which was not given.")
    asked = _Asked(
        named_pair(model, reference, dtype),
        source_of(data, layout, split, first),
        Reading(max_length=max_length, max_tokens=max_tokens, beta=beta),
        tuple(by or ()),
        judged,
        Generation(max_new_tokens, temperature, seed=seed),
    )
    with terminal_output(debug):
        pairs, wins = asked.found(kl)
    _show(pairs, wins, as_json)


def _show(pairs: Evaluation | None, wins: WinRate | None, as_json: bool) -> None:
    if as_json:
        print_json({**(pairs.to_dict() if pairs else {}), **({"win_rate": wins.to_dict()} if wins else {})})
        return
    if pairs is not None:
        _print(pairs)
    if wins is not None:
        _print_wins(wins)


@dataclass(frozen=True)
class _Asked:
    """What is to be found out."""

    named: tuple[NamedModel, NamedModel | None]
    source: Any
    reading: Reading
    by: tuple[str, ...]
    judged: Judged | None
    generation: Generation

    def found(self, kl: bool) -> tuple[Evaluation | None, WinRate | None]:
        """What pairs show, where the rows are pairs, and the win rate, where a judge was named."""
        from tether.data.sources.load import load_of_kind
        from tether.evaluate.answers.sampling import prompt_rows
        from tether.evaluate.score_rows import load_for

        prompts, judge, other = None, None, self.named[1]
        if self.judged is not None:
            if other is None:
                raise ConfigError("A win rate is over another model: name it with --reference.")
            judge, prompts = self.judged.made(), prompt_rows(self.source)
        alone = prompts is not None and load_of_kind(self.source, name="data")[1] != "pair"
        if alone and self.by:
            raise ConfigError("--by groups pairs, and the rows are none. Leave it out.")
        rows = None if alone else load_for(self.source, self.reading, self.by)
        policy, second = load_pair(*self.named)
        pairs = None if rows is None else self._pairs(rows, policy, second, kl)
        if prompts is None or judge is None or second is None:
            return pairs, None
        from tether.evaluate.answers.win_rate import compare_models

        return pairs, compare_models(policy, second, prompts, judge, self.generation)

    def _pairs(self, rows: Dataset, policy: Loaded, second: Loaded | None, kl: bool) -> Evaluation:
        from tether.evaluate.accuracy import evaluate_pairs
        from tether.evaluate.score_rows import score_rows

        scored = score_rows(rows, policy, second, self.reading, wants_kl=kl)
        return evaluate_pairs(scored, policy.named.name, second.named.name if second else None, self.by)


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
    if "log-prob" in found.rule and found.reference is None and (found.shorter or 0) >= _BY_LENGTH:
        lines.append(
            f"the shorter completion has the larger reward in {found.shorter:.1%} of the pairs of unequal lengths, so "
            "that the accuracy is that of lengths: name a model to compare with (--reference)"
        )
    if found.trained_on:
        lines.append(
            "the run was trained on just these rows: the figures tell how well they were learnt, and nothing of "
            "others. Name rows that it has not seen"
        )
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    for column, groups in found.by.items():
        table = Table(column, "pairs", "accuracy", "margin", box=None, pad_edge=False)
        for name, group in groups.items():
            table.add_row(name, f"{group.pairs:,}", *_cells(group))
        console.print()
        console.print(table)


def _print_wins(found: WinRate) -> None:
    order = f", {found.turned} of them as the order decided" if found.turned else ""
    unknown = found.prompts - found.judged
    for line in (
        f"\nwin rate of {found.first} over {found.second} by {found.judge}: {percent(found.rate)} of {found.judged} "
        f"prompts ({found.wins} wins, {found.ties} ties{order}, {found.losses} losses)"
        + (f"; {unknown} answers of the judge were not understood" if unknown else ""),
        f"at equal length: {percent(found.controlled)}; the answers have {found.characters[0]:.0f} and "
        f"{found.characters[1]:.0f} characters on average",
        f"answers: {found.how}",
    ):
        typer.echo(line)


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
