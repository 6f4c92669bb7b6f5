"""`tether data check FILE…` and `tether data show FILE`: rows looked at before anything is trained on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tether.cli.run import Debug
from tether.cli.words import rows_named
from tether.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tether.data import Report
    from tether.data.audit.audit import Check
    from tether.data.show import Counted, Token
    from tether.models.spec import ModelSpec
    from tether.training import PreferenceConfig
    from tether.training.algorithms.base import Algorithm
    from tether.types import Kind

app = typer.Typer(help="Look at preference data before it is trained on.", no_args_is_help=True)
PASSED = 1
_RUN_FILES = (".yaml", ".yml")
Files = Annotated[
    list[str],
    typer.Argument(
        help="Files, globs, folders or hub names; or one run file, with values in place of its own.",
        metavar="FILE",
        show_default=False,
    ),
]
TokenizerName = Annotated[
    str | None, typer.Option("--tokenizer", help="Tokenizer, for lengths in tokens: a model's name or folder.")
]
FormatName = Annotated[str | None, typer.Option("--format", help="Layout of the rows, such as chatml.intel.")]
KindName = Annotated[
    str | None,
    typer.Option("--kind", help="pair, ranked, unpaired, completion or prompt_only; left out: as the columns say."),
]
Page = Annotated[Path | None, typer.Option("--html", help="Write a page that needs nothing beside it.")]
Split = Annotated[
    str | None, typer.Option("--split", help="Part of a hub data set, or of a folder with train and test files.")
]
MaxLength = Annotated[int | None, typer.Option("--max-length", help="The run's limit in tokens.", min=2)]


@app.command("check", help="Audit rows: errors, duplicates, contradictions, leaks, biases, lengths; no model needed.")
def check(
    files: Files,
    evaluation: Annotated[
        list[str] | None, typer.Option("--eval", help="Rows that must not be among the training rows.")
    ] = None,
    tokenizer: TokenizerName = None,
    layout: FormatName = None,
    kind: KindName = None,
    split: Split = None,
    max_length: MaxLength = None,
    sample: Annotated[int | None, typer.Option(help="Look at about this many rows only.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    page: Page = None,
    debug: Debug = False,
) -> None:
    """Print what was found; exit with 1 where a limit of the run file's `data.check` is passed.

    Args:
        files: rows, or one run file, which then says all that options leave out.
        evaluation: held-out rows.
        tokenizer: a model's name or folder.
        layout: format of the rows.
        kind: what the rows are.
        split: which part of them.
        max_length: in tokens.
        sample: how many rows to look at.
        as_json: print JSON.
        page: where to write the page.
        debug: let the libraries speak.

    Raises:
        TetherError: the rows cannot be read at all, or an option is wrong.
    """
    from tether.cli.output import terminal_output
    from tether.data.audit.limits import passed

    asked = _Asked(files, tokenizer, layout, kind, split, max_length, evaluation)
    with terminal_output(debug):
        found = asked.checks(sample)
    over = passed(found, asked.limits)
    if as_json:
        typer.echo(json.dumps({"sets": [one.to_dict() for one in found], "passed": over}, indent=2))
    else:
        from tether.cli.data.tables import print_check

        for one in found:
            print_check(one)
        for line in over:
            typer.echo(f"Limit passed: {line}", err=True)
    if page is not None:
        from tether.cli.data.page import check_page

        page.write_text(check_page(found, over), encoding="utf-8", errors="replace")
    if over:
        raise typer.Exit(PASSED)


@app.command("show", help="Show rows as the model will see them: tokens, roles, mask and the prompt's end.")
def show(
    files: Files,
    tokenizer: TokenizerName = None,
    layout: FormatName = None,
    kind: KindName = None,
    split: Split = None,
    max_length: MaxLength = None,
    row: Annotated[int, typer.Option("--row", help="Which row, counted from 1.", min=1)] = 1,
    turns: Annotated[
        str | None, typer.Option(help="What is scored: all, assistant or last; left out: the run file's, or all.")
    ] = None,
    truncation: Annotated[
        str | None, typer.Option(help="keep_start, keep_end, middle or drop; left out: the run file's, or keep_start.")
    ] = None,
    page: Page = None,
    debug: Debug = False,
) -> None:
    """Print the tokens of one row.

    Args:
        files: rows, or one run file.
        tokenizer: a model's name or folder.
        layout: format of the rows.
        kind: what the rows are.
        split: which part of them.
        max_length: in tokens.
        row: number of the row, from 1.
        turns: what is scored.
        truncation: what is kept of a long row.
        page: where to write it.
        debug: let the libraries speak.

    Raises:
        TetherError: there is no such row, it would be dropped, or it cannot be read.
    """
    from tether.cli.data.tables import print_tokens
    from tether.cli.output import terminal_output

    asked = _Asked(files, tokenizer, layout, kind, split, max_length, None)
    with terminal_output(debug):
        shown, report = asked.shown(row, turns, truncation)
    for parts in shown:
        print_tokens(parts, row)
    for line in report.lines()[1:]:
        typer.echo(line)
    if page is not None:
        from tether.cli.data.page import tokens_page

        page.write_text(tokens_page(shown, row), encoding="utf-8", errors="replace")


class _Asked:
    """What the options and, where there is one, the run file say together."""

    def __init__(
        self,
        files: list[str],
        tokenizer: str | None,
        layout: str | None,
        kind: str | None,
        split: str | None,
        max_length: int | None,
        evaluation: list[str] | None,
    ) -> None:
        self.limits: dict[str, float] = {}
        self.kind, self.layout, self.split = kind, layout, split
        self.train: Any = files
        self.evaluation: Any = evaluation
        self._tokenizer, self._model, self.max_length = tokenizer, "", max_length
        self.run: PreferenceConfig | None = None
        self._algorithm: type[Algorithm[Any]] | None = None
        self.truncation, self.turns, self.boundary = "keep_start", "all", "split"
        if Path(files[0]).suffix in _RUN_FILES and all("=" in given for given in files[1:]):
            self._read_run_file(files[0], files[1:])

    def _read_run_file(self, file: str, overrides: list[str]) -> None:
        """All that decides how a run reads its rows, from the configuration that its trainer gets."""
        from tether.config import build, load_run_file
        from tether.config.fields import trainer_class

        run = load_run_file(file, overrides)
        self._algorithm = trainer_class(run.objective.loss).algorithm_class
        self.run, _, _ = build(run)
        self.train = run.data.train_rows
        self.evaluation = self.evaluation or run.data.eval_rows
        self.limits = run.data.check or {}
        self.kind = self.kind or self.run.kind
        self.max_length = self.max_length or self.run.max_length
        self.truncation, self.turns = self.run.truncation_mode, self.run.turns
        self.boundary = self.run.prompt_boundary
        self._model = run.model.name

    def tokenizer(self) -> Any:
        """The tokenizer that was named, or the processor where its model sees images; None without one.

        With a run file it is the run's, with the tokens that it adds and the chat template that it names.
        """
        from tether.models import load_processing, load_tokenizer
        from tether.training.setup.policy import processing_of

        if self._tokenizer is not None:
            try:
                return load_processing(self._tokenizer)
            except ConfigError:  # a folder of a tokenizer alone has no configuration of a model
                return load_tokenizer(self._tokenizer)
        if self.run is None:
            return None
        return processing_of(self._model, self.run)[0]

    def encoder_decoder(self) -> bool:
        """Whether the model reads prompts in an encoder; a tokenizer may stand alone."""
        from tether.models import load_config

        if self._tokenizer is None:
            return self.run is not None and bool(self._spec().load_config().is_encoder_decoder)
        try:
            return bool(load_config(self._tokenizer).is_encoder_decoder)
        except ConfigError:
            return False

    def _spec(self) -> ModelSpec:
        """The policy of the run file."""
        from tether.training.setup.policy import policy_spec

        assert self.run is not None
        return policy_spec(self._model, self.run)

    def rows(self, source: Any, kind: Kind | None = None, name: str = "data") -> tuple[Any, Kind]:
        """Rows, and what they are: as was asked for, or as the run reads them, or as their columns say."""
        from tether.data import load_rows
        from tether.data.rows.columns import KINDS
        from tether.data.sources.load import load_of_kind

        wanted = kind or self.kind
        if wanted is not None and wanted not in KINDS:
            raise ConfigError(f"--kind is {wanted}; it must be {', '.join(KINDS)}.")
        if isinstance(source, list):
            source = [rows_named(one) if isinstance(one, str) else one for one in source]
            source = source[0] if len(source) == 1 else source
        said = {"format": self.layout, "split": self.split}
        if any(said.values()):
            given = source if isinstance(source, dict) else {"path": source}
            source = {**given, **{key: value for key, value in said.items() if value is not None}}
        if wanted is None:
            return load_of_kind(source, name=name)
        return load_rows(source, kind=cast(Any, wanted), name=name), cast(Any, wanted)

    def shown(self, row: int, turns: str | None, truncation: str | None) -> tuple[list[list[list[Token]]], Report]:
        """The tokens of a row, counted from 1, and what was done to it."""
        from tether.data.show import shown_row

        made = self.tokenizer()
        if made is None:
            raise ConfigError("There is no tokenizer to show tokens with. Name one: --tokenizer MODEL, or a run file.")
        rows, own_kind = self.rows(self.train, name="train")
        if row > len(rows):
            raise DataError(f"--row is {row}; there are {len(rows):,} rows.")
        return shown_row(
            rows,
            row,
            made,
            max_length=self.max_length,
            kind=own_kind,
            turns=cast(Any, turns or self.turns),
            truncation_mode=cast(Any, truncation or self.truncation),
            boundary=self.boundary,
            encoder_decoder=self.encoder_decoder(),
            counted=self.counted(),
        )

    def counted(self) -> Counted:
        """What the run's loss is of; without a run, completions."""
        if self.run is None or self._algorithm is None:
            return "completions"
        return self._algorithm(self.run, self._spec().load_config()).counted

    def checks(self, sample: int | None) -> list[Check]:
        """The audit of the training rows, and of each evaluation set."""
        from tether.compute.threads import granted_cores
        from tether.data import is_origin, is_split, split_rows
        from tether.data.audit.limits import check_sets

        tokenizer = self.tokenizer()
        train, kind = self.rows(self.train, name="train")
        options: dict[str, Any] = {
            "kind": kind,
            "tokenizer": tokenizer,
            "max_length": self.max_length,
            "truncation_mode": self.truncation,
            "encoder_decoder": self.encoder_decoder(),
            "sample": sample,
            "processes": granted_cores(),
        }
        held = self.evaluation
        if held is None:
            sets = {}
        elif is_split(held):
            train, aside = split_rows(train, held, kind=kind)
            sets = {"eval": aside}
        else:
            named = held if isinstance(held, dict) and not is_origin(held) else {"": held}
            sets = {
                f"eval_{name}" if name else "eval": self.rows(part, kind, f"eval_{name}" if name else "eval")[0]
                for name, part in named.items()
            }
        return check_sets(train, sets, **options)
