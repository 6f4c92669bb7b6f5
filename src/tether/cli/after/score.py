"""`tether score FILE`: log-probs and implicit rewards of every completion, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tether.cli.after.options import (
    MODEL,
    Beta,
    Dtype,
    First,
    Format,
    MaxLength,
    MaxTokens,
    Reference,
    Split,
    load_pair,
    named_pair,
    print_json,
    source_of,
)
from tether.cli.run import AsJson, Debug
from tether.errors import ConfigError

HELP = "Log-probs and implicit rewards of every completion of a file, under any pair of models; JSONL or Parquet."


def score(
    data: Annotated[str, typer.Argument(help="Rows: a file, folder or hub name.", metavar="FILE", show_default=False)],
    model: Annotated[str, typer.Option("--model", help=MODEL, show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="New file, .jsonl or .parquet.", show_default=False)],
    reference: Reference = None,
    kind: Annotated[
        str | None, typer.Option(help="pair, ranked, unpaired or completion; left out: as the columns say.")
    ] = None,
    beta: Beta = None,
    kl: Annotated[bool, typer.Option("--kl/--no-kl", help="KL of policy and reference at each scored token.")] = False,
    layout: Format = None,
    split: Split = None,
    first: First = None,
    max_length: MaxLength = None,
    max_tokens: MaxTokens = 2048,
    dtype: Dtype = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a line for each completion.

    Raises:
        TetherError: nothing is at a name, the rows cannot be read, or the output cannot be written.
    """
    from tether.cli.output import terminal_output
    from tether.data.rows.columns import KINDS
    from tether.data.sources.load import load_of_kind
    from tether.evaluate.rows_out import check_target, table_of, write_rows
    from tether.evaluate.score_rows import Reading, load_for, score_rows

    check_target(output)
    if kind is not None and (kind not in KINDS or kind == "prompt_only"):
        raise ConfigError(f"--kind is {kind}; it must be pair, ranked, unpaired or completion.")
    with terminal_output(debug):
        named = named_pair(model, reference, dtype)
        source: Any = source_of(data, layout, split, first)
        chosen: Any = kind or load_of_kind(source, name="data")[1]
        if chosen == "prompt_only":
            raise ConfigError(f"'{data}' has prompts alone, and there is no completion to score.")
        reading = Reading(kind=chosen, max_length=max_length, max_tokens=max_tokens, beta=beta)
        rows = load_for(source, reading)
        policy, other = load_pair(*named)
        scored = score_rows(rows, policy, other, reading, wants_kl=kl)
        if kl and scored.kl is None:
            raise ConfigError(f"--kl was given, and there is none: {scored.no_kl}. Leave it out.")
    facts = {"model": model, "reference": other.named.name if other else "", "rewards": scored.rule}
    write_rows(table_of(scored, facts), output)
    said = {"file": str(output), "rows": len(scored.source_rows), "completions": len(scored.rewards), **facts}
    if as_json:
        print_json(said)
    else:
        typer.echo(f"{said['completions']:,} completions of {said['rows']:,} rows written to {output}")
        typer.echo(f"rewards: {scored.rule}")
