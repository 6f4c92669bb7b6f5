"""`tether rollouts show` and `score`: what a run sampled, and other rewards of the same completions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.cli.run import AsJson, Debug
from tether.errors import ConfigError

if TYPE_CHECKING:
    from tether.rewards import Reward
    from tether.rollout.files import Kept

app = typer.Typer(help="Look at the completions that a run sampled, and score them with other rewards.")
_MOST = 300  # letters of a text
_Folder = Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN", show_default=False)]


@app.callback()
def _rollouts() -> None:
    """Commands of kept rollouts."""


@app.command("show")
def show(
    folder: _Folder,
    step: Annotated[int | None, typer.Option(help="Number of the rollout, from 0; left out: the last.", min=0)] = None,
    prompts: Annotated[int, typer.Option(help="How many prompts, the widest spread of rewards first.", min=1)] = 4,
    whole: Annotated[bool, typer.Option("--whole", help="Do not shorten completions.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print completions of a rollout with their rewards, the best of each prompt first."""
    from tether.rewards.judge import prompt_text
    from tether.rollout.files import kept_rollouts, read_rollout

    numbers = kept_rollouts(folder)
    number = numbers[-1] if step is None else step
    groups = read_rollout(folder, number)
    shown = sorted(groups, key=lambda group: -_spread(group))[:prompts]
    if as_json:
        rows = [[asdict(one) for one in group] for group in shown]
        typer.echo(json.dumps({"rollout": number, "of": len(numbers), "groups": rows}, ensure_ascii=False, default=str))
        return
    typer.echo(f"rollout {number} of {len(numbers)}: {_figures(groups)}")
    for group in shown:
        prompt = prompt_text(group[0].row.get("prompt", ""))
        typer.echo(f"\nrow {group[0].source_row}  {_short(prompt, whole, end=True)}")
        for one in sorted(group, key=lambda one: -(one.total if one.total is not None else float("-inf"))):
            said = "  ".join(f"{name} {_number(value)}" for name, value in one.rewards.items()) or "no rewards yet"
            cut = "  [cut off]" if one.finish == "length" else ""
            typer.echo(f"  {said}{cut}\n    {_short(one.text, whole)}")


@app.command("score")
def score(
    folder: _Folder,
    rewards: Annotated[
        list[str],
        typer.Option(
            "--reward",
            help="As in a run file, in braces: '{name: numeric_answer}'; or the name alone, or file.py:function.",
        ),
    ],
    to: Annotated[Path | None, typer.Option(help="JSONL to write, a line for each completion.")] = None,
    debug: Debug = False,
) -> None:
    """Score the kept completions of a run with other rewards, and compare with those that it was trained on.

    Raises:
        TetherError: no rollouts, a reward that does not exist or that failed, or rows that are gone.
    """
    from tether.cli.output import terminal_output
    from tether.config.arguments import rewards_of
    from tether.rewards import Calling, call_rewards, check_signatures
    from tether.rollout.files import kept_rollouts, read_rollout

    functions = rewards_of([_reward_named(one) for one in rewards])
    if to is not None and to.exists():
        raise ConfigError(f"{to} exists. Remove it, or write elsewhere with --to FILE.")
    with terminal_output(debug):
        every = [(number, group) for number in kept_rollouts(folder) for group in read_rollout(folder, number)]
        judged = _judged(every)
        check_signatures(functions, judged.columns)
        table = call_rewards(functions, judged, calling=Calling())
    flat = [(number, one) for number, group in every for one in group]
    if to is not None:
        _write(to, flat, functions, table.values.tolist())
    for line in _compared(flat, functions, table.values):
        typer.echo(line)


def _reward_named(text: str) -> Any:
    from pydantic import ValidationError

    from tether.config.document import parse
    from tether.config.sections import Judge

    value, _ = parse(text, "--reward")
    if isinstance(value, str):
        value = {"python": value} if ".py:" in value else {"name": value}
    try:
        return Judge.model_validate(value)
    except ValidationError as error:
        raise ConfigError(f"--reward {text}: {error.errors()[0]['msg']}.") from error


def _judged(every: list[tuple[int, list[Kept]]]) -> Any:
    """The kept completions as reward functions see them, with the columns that every row has."""
    from tether.rewards import Judged

    flat = [one for _, group in every for one in group]
    names = [name for name in flat[0].row if name != "prompt" and all(name in one.row for one in flat)]
    columns: dict[str, list[Any]] = {name: [one.row[name] for one in flat] for name in names}
    columns["finish"] = [one.finish for one in flat]
    prompts = [one.row.get("prompt", "") for one in flat]
    said: list[Any] = [
        one.text if isinstance(prompt, str) else [{"role": "assistant", "content": one.text}]
        for one, prompt in zip(flat, prompts, strict=True)
    ]
    return Judged(prompts, said, [one.ids for one in flat], columns, [one.source_row for one in flat])


def _write(path: Path, flat: list[tuple[int, Kept]], functions: tuple[Reward, ...], values: list[list[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for (number, one), found in zip(flat, values, strict=True):
            new = {
                reward.name: None if value != value else value for reward, value in zip(functions, found, strict=True)
            }
            row = {"rollout": number, "source_row": one.source_row, "branch": one.branch, "completion": one.text}
            file.write(json.dumps({**row, "trained_on": one.rewards, "rewards": new}, ensure_ascii=False) + "\n")


def _compared(flat: list[tuple[int, Kept]], functions: tuple[Reward, ...], values: Any) -> list[str]:
    """Means of the new rewards, at the first and the last rollout, and how they go with those of the run."""
    import torch

    numbers = torch.tensor([number for number, _ in flat])
    totals = torch.tensor([float("nan") if one.total is None else one.total for _, one in flat])
    lines = [f"{len(flat)} completions of {len(numbers.unique())} rollouts"]
    for place, reward in enumerate(functions):
        column = values[:, place]
        first, last = (column[numbers == edge].nanmean().item() for edge in (numbers.min(), numbers.max()))
        line = f"{reward.name}: mean {column.nanmean().item():.4g} (first rollout {first:.4g}, last {last:.4g})"
        known = ~(column.isnan() | totals.isnan())
        pair = torch.stack([column[known], totals[known]])
        if known.sum() > 2 and (pair.std(1) > 0).all():
            line += f"; correlation with the run's rewards {torch.corrcoef(pair)[0, 1].item():.3f}"
        lines.append(line)
    return lines


def _figures(groups: list[list[Kept]]) -> str:
    flat = [one for group in groups for one in group]
    known = [one.total for one in flat if one.total is not None]
    mean = f", mean reward {sum(known) / len(known):.4g}" if known else ""
    cut = sum(one.finish == "length" for one in flat)
    return f"{len(groups)} prompts, {len(flat)} completions{mean}, {cut} cut off"


def _spread(group: list[Kept]) -> float:
    known = [one.total for one in group if one.total is not None]
    return max(known) - min(known) if known else 0.0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _short(text: str, whole: bool, *, end: bool = False) -> str:
    """A text on one line, without what would steer a terminal; of a long one the beginning, or the end."""
    text = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in " ".join(text.split()))
    if whole or len(text) <= _MOST:
        return text
    return f"…{text[-_MOST:]}" if end else f"{text[:_MOST]}…"
