"""The one check of all rows, before any weights load, and the rows as `Preference` records. Called by `prepare`.

Rows have TRL's columns, for the kind that is wanted:

- `pair`: `chosen` and `rejected`, and `prompt` unless both begin with it;
- `ranked`: `prompt` and `completions`, a list with the best first or with `scores` beside it;
- `unpaired`: `prompt`, `completion` and `label`; pairs are read too, each as two rows;
- `completion`: `prompt` and `completion`, or `messages`, or `text`;
- `prompt_only`: `prompt`.

Each of them is text, or a list of `{"role": …, "content": …}`. Besides them, `weight` and `margin` are numbers of the
row, and `tools` and `chat_template_kwargs` reach the chat template. Rows are counted from 1 in messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import pyarrow as pa
from datasets import Dataset

from tether.data.rows.columns import BATCH_ROWS, EXTRAS, IMAGE_COLUMNS, KINDS, TEXTS, VALUES, columns_to_read
from tether.data.rows.conversion import fitting
from tether.data.rows.shared import split_prompt, told, untrained_by
from tether.data.rows.values import (
    Faults,
    Form,
    as_number,
    clean,
    cleaned,
    decoded,
    extra_faults,
    form_of,
    list_faults,
    number_faults,
    score_faults,
    spells_messages,
    text_faults,
    texts_of,
)
from tether.errors import ConfigError, DataError
from tether.types import Kind, Messages, Preference

# Which turns of a completion of several are scored.
Turns = Literal["all", "assistant", "last"]
TURNS: tuple[Turns, ...] = ("all", "assistant", "last")
# Columns that hold the prompt under another name; with them in place a prompt is not guessed from shared text.
_PROMPT_LIKE = ("question", "instruction", "input", "query", "context", "problem", "prompts")
# Columns that are a part of the prompt beside one of these.
_BESIDE = (*_PROMPT_LIKE, "system", "history")


@dataclass(frozen=True)
class Schema:
    """What the check found in rows that passed it.

    Args:
        form: whether prompts and completions are text or messages.
        shared_prompt: the prompt is what chosen and rejected begin with together, not a column.
        rows: how many there are.
        unused_columns: columns that training does not read, in their order.
        message_fields: fields of messages beside `role` and `content`; they reach the chat template.
        kind: what the rows hold; `pair` where pairs are to be read as unpaired.
        columns: columns that are read.
    """

    form: Form
    shared_prompt: bool
    rows: int
    unused_columns: tuple[str, ...] = ()
    message_fields: tuple[str, ...] = ()
    kind: Kind = "pair"
    columns: tuple[str, ...] = ()

    @property
    def values(self) -> tuple[str, ...]:
        """Columns of numbers, see `Preference.values`."""
        return tuple(column for column in VALUES if column in self.columns)

    @property
    def whole(self) -> bool:
        """Rows are one text or conversation each, without a boundary between prompt and completion."""
        return self.kind == "completion" and "completion" not in self.columns


def read_preferences(
    rows: Dataset,
    *,
    kind: Kind = "pair",
    turns: Turns = "all",
    name: str = "data",
    schema: Schema | None = None,
    first: int = 0,
) -> Schema:
    """Check every row once and say which form the rows have.

    Args:
        rows: as `load_rows` returns them.
        kind: what the rows are to be read as.
        turns: which turns of a completion are to be scored; `messages` must then have such turns.
        name: what to call these rows in messages.
        schema: the form that they must have; None: that of the first row.
        first: number of the first row, from 0.

    Returns:
        The form and what is not used. `preferences(rows, schema)` then gives the rows as records.

    Raises:
        ConfigError: `kind` or `turns` is unknown.
        DataError: a column is missing, a value has a wrong type, rows mix forms, a prompt cannot be told from the
            completions, or rows hold images. The message names rows, fields, what was given and what to do.
    """
    if turns not in TURNS:
        raise ConfigError(f"turns is {turns!r}; it must be {', '.join(f'`{one}`' for one in TURNS)}.")
    schema = schema or schema_of(rows, kind, name)
    if turns != "all" and schema.form == "standard":
        raise ConfigError(f"{name}: turns is `{turns}`, but the rows are text, which has no turns. Set turns to `all`.")
    faults, fields = Faults(), set()
    broken: int | None = None
    for number, row in enumerate(python_rows(rows, schema.columns), first + 1):
        for fault in row_faults(row, schema, turns):
            faults.add(number, fault)
        broken = number - first - 1 if broken is None and faults.total else broken
        if schema.form == "conversational" and not faults.total:
            fields |= {key for message in _messages_in(row, schema) for key in clean(message)}
    if faults.total:
        hint = "" if broken is None else _format_hint(rows, broken, kind)
        raise DataError(faults.message(name, len(rows)) + hint)
    return replace(schema, message_fields=tuple(sorted(fields - {"role", "content"})))


def schema_of(rows: Dataset, kind: Kind, name: str = "data") -> Schema:
    """What columns and the first rows say of all of them; no row is checked.

    Raises:
        ConfigError: `kind` is unknown.
        DataError: columns are missing.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}; it must be {', '.join(f'`{one}`' for one in KINDS)}.")
    try:
        columns = columns_to_read(rows, kind, name)
    except DataError as error:
        hint = _format_hint(rows, 0, kind)
        raise DataError(f"{error}{hint}") from error
    return _form_of(rows, columns, kind)


def _format_hint(rows: Dataset, number: int, kind: Kind) -> str:
    """The format of another tool that reads a row which cannot be read as it is."""
    columns = [column for column in rows.column_names if column not in IMAGE_COLUMNS]
    row = next(python_rows(rows, columns, number, number + 1), None)
    found = None if row is None else fitting(row, kind, lambda read: _is_sound(read, kind))
    return f" The row can be read as it is with `format: {found}`, which reads all that belongs to it." if found else ""


def _is_sound(row: Mapping[str, Any], kind: Kind) -> bool:
    """Whether a row that a format has read has no fault, and no message of which the text spells out messages."""
    columns = tuple(column for column in row if column in (*TEXTS, *VALUES, *EXTRAS, "scores"))
    sample = next((value for value in _samples(row) if isinstance(value, (str, list))), None)
    schema = Schema(form_of(sample), False, 1, (), (), "pair" if "chosen" in columns else kind, columns)
    if row_faults({column: row[column] for column in columns}, schema):
        return False
    parts = [row[column] for column in columns if column in TEXTS and column != "completions"]
    return not any(isinstance(text, str) and spells_messages(text) for part in parts for text in texts_of(part))


def preferences(
    rows: Dataset, schema: Schema, start: int = 0, stop: int | None = None, *, turns: Turns = "all", first: int = 0
) -> list[Preference]:
    """The rows `start` to `stop` (from 0, `stop` excluded) of a checked data set as records, in order.

    Args:
        rows: what was checked.
        schema: what `read_preferences` said of them.
        start: first row.
        stop: row after the last; None for all.
        turns: which turns are to be scored; unless all, what comes before the first of an answer is the prompt.
        first: number of the first row of `rows`, from 0.

    Returns:
        One record per row, with `source_row` counted from 0.
    """
    rows_of = enumerate(python_rows(rows, schema.columns, start, stop), first + start)
    return [record(row, schema, number, turns) for number, row in rows_of]


def record(row: Mapping[str, Any], schema: Schema, number: int, turns: Turns = "all") -> Preference:
    """One checked row as a record; see `preferences`."""
    prompt: str | Messages
    completions: tuple[Any, ...]
    if schema.kind == "pair":
        completions = cleaned(row["chosen"]), cleaned(row["rejected"])
        if schema.shared_prompt:
            prompt, *parted = split_prompt(*completions)
            completions = tuple(parted)
        else:
            prompt = cleaned(row["prompt"])
    elif schema.whole:
        whole = cleaned(row["messages"] if "messages" in row else row["text"])
        answer = _first_answer(whole) if turns != "all" else 0
        prompt, completions = whole[:answer], (whole[answer:],)
    else:
        prompt = cleaned(row["prompt"])
        completions = tuple(map(cleaned, _ranked(row))) if schema.kind == "ranked" else ()
        completions = (cleaned(row["completion"]),) if "completion" in row else completions
    return Preference(
        prompt,
        completions,
        schema.kind,
        number,
        values={column: cast(float, as_number(column, row[column])) for column in schema.values},
        tools=decoded(row.get("tools")) or None,
        chat_template_kwargs=decoded(row.get("chat_template_kwargs")) or {},
    )


def unpaired(pair: Preference) -> list[Preference]:
    """A pair as two rows of one completion each: the chosen one labelled 1, the rejected one 0.

    Example:
        >>> [(row.completions, row.values["label"]) for row in unpaired(Preference("2 + 2 =", (" 4", " 5"), "pair", 0))]
        [((' 4',), 1.0), ((' 5',), 0.0)]
    """
    return [
        replace(pair, completions=(completion,), kind="unpaired", values={**pair.values, "label": label})
        for completion, label in zip(pair.completions, (1.0, 0.0), strict=True)
    ]


def explain_mixed_types(
    rows: Sequence[Mapping[str, Any]], name: str, column: str, error: Exception, first: int = 0
) -> str:
    """The message for rows of which a column does not fit one table type.

    Args:
        rows: plain rows.
        name: what to call these rows.
        column: the one that does not fit.
        error: what Arrow said, for values that are each allowed but do not fit together.
        first: number of the first row, from 0.

    Returns:
        A message that names rows and fields.
    """
    columns = [column for column in TEXTS if any(column in row for row in rows)]
    singles = [column for column in columns if column != "completions"]
    samples = [value for row in rows for key in singles if isinstance(value := row.get(key), (str, list))]
    form: Form | None = form_of(samples[0]) if samples else None
    faults = Faults()
    for number, row in enumerate(rows, first + 1):
        for own in columns:
            check = list_faults if own == "completions" else text_faults
            for fault in check(own, row.get(own), form):
                faults.add(number, fault)
    if not faults.total:
        for number, row in enumerate(rows, first + 1):
            if reason := _unstorable([row.get(column)]):
                faults.add(number, f"`{column}` cannot be stored ({reason})")
    if not faults.total:
        example = next(row[column] for row in rows if row.get(column) is not None)
        for number, row in enumerate(rows, first + 1):
            if reason := _unstorable([example, row.get(column)]):
                faults.add(number, f"`{column}` cannot be stored beside the others ({reason})")
    if faults.total:
        return faults.message(name, len(rows))
    return f"{name}: values of `{column}` do not fit one type ({error}). Give every message the same field types."


def _unstorable(values: list[Any]) -> str | None:
    """Why values do not fit into one column; None where they do."""
    try:
        pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as reason:
        return (str(reason).splitlines() or [type(reason).__name__])[0]
    return None


def python_rows(
    rows: Dataset, columns: Sequence[str], start: int = 0, stop: int | None = None
) -> Iterator[dict[str, Any]]:
    """Rows as plain dictionaries of some columns."""
    plain = rows.select_columns(list(columns)).with_format(None)
    stop = len(rows) if stop is None else stop
    for first in range(start, stop, BATCH_ROWS):
        batch = plain[first : min(first + BATCH_ROWS, stop)]
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def row_faults(row: Mapping[str, Any], schema: Schema, turns: Turns = "all") -> list[str]:
    """All faults of one row; those of its fields, or, where each is well formed, those of the fields together."""
    faults: list[str] = []
    for column, value in row.items():
        if column == "prompt" and schema.shared_prompt:
            continue
        if column in VALUES:
            faults += number_faults(column, value)
        elif column == "scores":
            faults += score_faults(value, row["completions"])
        elif column in EXTRAS:
            faults += extra_faults(column, value, schema.form)
        elif column == "completions":
            faults += list_faults(column, value, schema.form)
        else:
            faults += text_faults(column, value, schema.form)
    return faults or list(_joint_faults(row, schema, turns))


def _form_of(rows: Dataset, columns: tuple[str, ...], kind: Kind) -> Schema:
    """The form of the first row whose completions have one; the check then holds every row to it."""
    held: Kind = "pair" if "chosen" in columns else kind
    unused = tuple(column for column in rows.column_names if column not in columns)
    whole = Schema("standard", held == "pair" and "prompt" not in columns, len(rows), unused, (), held, columns)
    for row in python_rows(rows, columns):
        sample = next((value for value in _samples(row) if isinstance(value, (str, list))), None)
        if sample is None:
            continue
        # Some data sets repeat a message, or all of them, in a `prompt` of text beside whole conversations.
        if held == "pair" and isinstance(sample, list) and "prompt" in columns and _is_text(rows, "prompt"):
            return replace(whole, form="conversational", shared_prompt=True, unused_columns=("prompt", *unused))
        return replace(whole, form=form_of(sample))
    return whole


def _is_text(rows: Dataset, column: str) -> bool:
    """Whether a column holds text, or nothing; told from its type, so that no row decides for the others."""
    kind = rows.features.arrow_schema.field(column).type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _samples(row: Mapping[str, Any]) -> Iterator[Any]:
    """Values that tell the form of a row; its prompt last, since it may be text beside whole conversations."""
    listed = row.get("completions")
    yield from listed if isinstance(listed, list) else ()
    yield from (row[column] for column in TEXTS if column in row and column not in ("completions", "prompt"))
    yield row.get("prompt")


def _messages_in(row: Mapping[str, Any], schema: Schema) -> Iterator[Any]:
    for column in TEXTS:
        if column in row and not (column == "prompt" and schema.shared_prompt):
            for part in row[column] if column == "completions" else (row[column],):
                yield from part


def _ranked(row: Mapping[str, Any]) -> list[Any]:
    """Completions with the best first; those with equal scores in their order."""
    completions, scores = row["completions"], row.get("scores")
    if scores is None:
        return completions
    numbers = [cast(float, as_number("scores", score)) for score in scores]
    order = sorted(range(len(completions)), key=lambda place: -numbers[place])
    return [completions[place] for place in order]


def _first_answer(messages: Messages) -> int:
    return next((place for place, message in enumerate(messages) if message["role"] == "assistant"), len(messages))


def _joint_faults(row: Mapping[str, Any], schema: Schema, turns: Turns) -> Iterator[str]:
    """Faults that show only when the fields of a row, each well formed, are seen together."""
    if schema.form == "conversational":
        yield from _flag_faults(row, schema, turns)
    if schema.whole:
        if turns != "all" and _first_answer(row["messages"]) in (0, len(row["messages"])):
            what = "begins with an" if row["messages"][0]["role"] == "assistant" else "has no"
            yield f"`messages` {what} answer of the assistant; a question and then an answer are needed"
        return
    if schema.kind == "pair":
        yield from _pair_faults(row, schema)
    for column in ("chosen", "rejected", "completion", "completions"):
        parts = row.get(column, ())
        for part in parts if column == "completions" else (parts,):
            if isinstance(part, list) and part[-1]["role"] in ("user", "system", "tool"):
                yield f"the last message of `{column}` is from the {part[-1]['role']}; it must be an answer"


def _flag_faults(row: Mapping[str, Any], schema: Schema, turns: Turns) -> Iterator[str]:
    """What messages say of themselves, that they are not trained on, where something else would be done."""
    for column in ("messages",) if schema.whole else ("chosen", "rejected", "completion", "completions"):
        parts = row.get(column, ())
        for messages in parts if column == "completions" else (parts,):
            own = [message for message in messages if message["role"] == "assistant"]
            odd = [message["weight"] for message in own if message.get("weight") not in (None, 0, 1)]
            if odd:
                yield f"a message of `{column}` has the weight {odd[0]!r}; a turn is scored or not, which is 1 or 0"
            flags = [flag for flag in map(untrained_by, own) if flag]
            # Of pairs without a prompt, what both begin with is the prompt, which is not scored in any case.
            if flags and turns == "all" and not schema.shared_prompt:
                yield (
                    f"a message of `{column}` says that it is not trained on (`{flags[0]}`), and all of it is scored; "
                    "set `turns` to `assistant`, which leaves such messages out, or take the field away"
                )
            elif flags and len(flags) == len(own) and turns != "all":
                yield f"every answer of `{column}` says that it is not trained on (`{flags[0]}`)"


def _pair_faults(row: Mapping[str, Any], schema: Schema) -> Iterator[str]:
    chosen, rejected = cleaned(row["chosen"]), cleaned(row["rejected"])
    if schema.shared_prompt:
        prompt, *_ = split_prompt(chosen, rejected)
        if not prompt:
            yield "`chosen` and `rejected` do not begin alike, so no prompt can be told; add a `prompt` column"
        near = [column for column in schema.unused_columns if column.lower() in (*_PROMPT_LIKE, "prompt")]
        if isinstance(chosen, str) and near:
            beside = [column for column in schema.unused_columns if column.lower() in _BESIDE and column != near[0]]
            advice = "rename it to `prompt`, or remove it"
            if beside:  # they would be lost
                advice = f"`{beside[0]}` belongs to it, so name the format that reads both"
            yield f"there is no `prompt`, but a column `{near[0]}`; {advice}"
    elif isinstance(chosen, list) and told(prompt := cleaned(row["prompt"])) == told(chosen[: len(prompt)]):
        yield "`chosen` repeats the messages of `prompt`; leave them out of one of the two"
