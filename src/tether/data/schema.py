"""The one check of all rows, before any weights load, and the rows as `Preference` records. Called by `prepare`.

Three forms are read, with TRL's names: standard text (`prompt`, `chosen`, `rejected` are strings), conversational
(lists of `{"role": …, "content": …}`), and either of them without `prompt`, where what `chosen` and `rejected` begin
with together is the prompt. Rows are counted from 1 in messages.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from datasets import Dataset

from tether.errors import DataError
from tether.types import Messages, Preference

Form = Literal["standard", "conversational"]

COLUMNS = ("prompt", "chosen", "rejected")
SHOWN_FAULTS = 5
BATCH_ROWS = 1000
# Columns that would change what a model sees, and that this version does not read.
_UNSUPPORTED = ("tools", "images", "image", "chat_template_kwargs")
_UNSUPPORTED_FIELDS = ("tool_calls", "function_call")
# Columns that hold the prompt under another name; with them in place a prompt is not guessed from shared text.
_PROMPT_LIKE = ("question", "instruction", "input", "query", "context", "problem", "prompts")
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content)['"]\s*:""")
_ALLOWED = {None: "text or a list of messages", "standard": "text", "conversational": "a list of messages"}
Sequential = TypeVar("Sequential", str, list)


@dataclass(frozen=True)
class Schema:
    """What the check found in rows that passed it.

    Args:
        form: whether prompts and completions are text or messages.
        shared_prompt: the prompt is what chosen and rejected begin with together, not a column.
        rows: how many there are.
        unused_columns: columns that training does not read, in their order.
        message_fields: fields of messages beside `role` and `content`; they reach the chat template.
    """

    form: Form
    shared_prompt: bool
    rows: int
    unused_columns: tuple[str, ...] = ()
    message_fields: tuple[str, ...] = ()


@dataclass
class _Faults:
    shown: list[str] = field(default_factory=list)
    total: int = 0
    rows: set[int] = field(default_factory=set)

    def add(self, row: int, fault: str) -> None:
        self.total += 1
        self.rows.add(row)
        if len(self.shown) < SHOWN_FAULTS:
            self.shown.append(f"row {row}: {fault}")

    def message(self, name: str, rows: int) -> str:
        head = f"{name}: {len(self.rows)} of {rows} rows cannot be used"
        head += f" ({self.total} faults, the first {SHOWN_FAULTS} shown)" if self.total > len(self.shown) else ""
        return f"{head}. {'; '.join(self.shown)}. Correct or remove them (rows count from 1)."


def read_preferences(rows: Dataset, *, name: str = "data") -> Schema:
    """Check every row once and say which form the rows have.

    Args:
        rows: as `load_rows` returns them.
        name: what to call these rows in messages.

    Returns:
        The form and what is not used. `preferences(rows, schema)` then gives the rows as records.

    Raises:
        DataError: a column is missing, a value has a wrong type, rows mix forms, a prompt cannot be told from the
            completions, or rows hold tools or images. The message names rows, fields, what came and what to do.
    """
    unused = _check_columns(rows, name)
    schema = _form_of(rows, unused)
    faults, fields = _Faults(), set()
    for number, row in enumerate(_python_rows(rows), 1):
        _check_row(number, row, schema, faults)
        if schema.form == "conversational" and not faults.total:
            fields |= {key for value in row.values() if isinstance(value, list) for m in value for key in _clean(m)}
    if faults.total:
        raise DataError(faults.message(name, len(rows)))
    extra = tuple(sorted(fields - {"role", "content"}))
    return Schema(schema.form, schema.shared_prompt, schema.rows, schema.unused_columns, extra)


def preferences(rows: Dataset, schema: Schema, start: int = 0, stop: int | None = None) -> list[Preference]:
    """The rows `start` to `stop` (from 0, `stop` excluded) of a checked data set as records, in order.

    Args:
        rows: what was checked.
        schema: what `read_preferences` said of them.
        start: first row.
        stop: row after the last; None for all.

    Returns:
        One record per row, with `source_row` counted from 0.
    """
    stop = len(rows) if stop is None else stop
    records = []
    for number, row in enumerate(_python_rows(rows, start, stop), start):
        chosen, rejected = _cleaned(row["chosen"]), _cleaned(row["rejected"])
        if schema.shared_prompt:
            prompt, chosen, rejected = split_prompt(chosen, rejected)
        else:
            prompt = _cleaned(row["prompt"])
        records.append(Preference(prompt, (chosen, rejected), "pair", number))
    return records


def split_prompt(chosen: Sequential, rejected: Sequential) -> tuple[Sequential, Sequential, Sequential]:
    """Take what two completions begin with together as their prompt, as TRL's `extract_prompt` does.

    In text, one space before the place where they differ goes to the completions. Where one is the beginning of the
    other, its last message (or character) stays in the completion, so that none is empty.

    Args:
        chosen: text or messages, prompt included.
        rejected: the same.

    Returns:
        The prompt and the two completions without it; an empty prompt when they share nothing.

    Example:
        >>> split_prompt("The sky is blue.", "The sky is green.")
        ('The sky is', ' blue.', ' green.')
    """
    shorter = min(len(chosen), len(rejected))
    low, high = 0, shorter
    while low < high:  # slices compare in C; a loop over characters would dominate the whole preparation
        middle = (low + high + 1) // 2
        low, high = (middle, high) if chosen[:middle] == rejected[:middle] else (low, middle - 1)
    if low == shorter:
        low = max(shorter - 1, 0)
    elif low and isinstance(chosen, str) and chosen[low - 1] == " ":
        low -= 1
    return chosen[:low], chosen[low:], rejected[low:]


def explain_mixed_types(rows: Sequence[Mapping[str, Any]], name: str, reason: str) -> str:
    """The message for rows of which a column does not fit one table type.

    Args:
        rows: plain rows.
        name: what to call these rows.
        reason: what Arrow said, for values that are each allowed but do not fit together.

    Returns:
        A message that names rows and fields.
    """
    samples = [value for row in rows for key in COLUMNS if isinstance(value := row.get(key), (str, list))]
    form: Form | None = _form(samples[0]) if samples else None
    faults = _Faults()
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    for number, row in enumerate(rows, 1):
        for fault in (fault for column in columns for fault in _value_faults(column, row.get(column), form)):
            faults.add(number, fault)
    if faults.total:
        return faults.message(name, len(rows))
    return f"{name}: values of one column do not fit one type ({reason}). Give every message the same field types."


def _check_columns(rows: Dataset, name: str) -> list[str]:
    found = rows.column_names
    missing = [column for column in ("chosen", "rejected") if column not in found]
    if missing:
        hints = []
        for column in missing:
            near = difflib.get_close_matches(column, [f for f in found if f not in COLUMNS], n=1, cutoff=0.5)
            hints += [f"`{near[0]}` looks like `{column}`"] if near else []
        raise DataError(
            f"{name}: {_named(missing)} missing. Columns found: {', '.join(found) or 'none'}. "
            "A preference row has `chosen` and `rejected`, and `prompt` unless both begin with it; rename the columns"
            f"{' (' + ', '.join(hints) + ')' if hints else ''}."
        )
    for column in _UNSUPPORTED:
        if column in found and (row := _first_filled(rows, column)) is not None:
            raise DataError(
                f"{name}: row {row}: the column `{column}` holds values, and Tether does not read it yet, so the model "
                "would see something else than was meant. Remove the column if the rows are complete without it."
            )
    return [column for column in found if column not in COLUMNS]


def _named(columns: Sequence[str]) -> str:
    listed = " and ".join(f"`{column}`" for column in columns)
    return f"the column {listed} is" if len(columns) == 1 else f"the columns {listed} are"


def _first_filled(rows: Dataset, column: str) -> int | None:
    """Number, from 1, of the first row with a value; read as Arrow, so that no image is decoded."""
    plain = rows.select_columns([column]).with_format("arrow")
    for start in range(0, len(plain), BATCH_ROWS):
        for number, value in enumerate(plain[start : start + BATCH_ROWS][column].to_pylist(), start + 1):
            if value not in (None, "", "[]", "{}", [], {}) and not (
                isinstance(value, dict) and not any(value.values())
            ):
                return number
    return None


def _python_rows(rows: Dataset, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
    columns = [column for column in COLUMNS if column in rows.column_names]
    plain = rows.select_columns(columns).with_format(None)
    stop = len(rows) if stop is None else stop
    for first in range(start, stop, BATCH_ROWS):
        batch = plain[first : min(first + BATCH_ROWS, stop)]
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _form(value: Any) -> Form:
    return "conversational" if isinstance(value, list) else "standard"


def _form_of(rows: Dataset, unused: list[str]) -> Schema:
    """The form of the first row whose completions have one; the check then holds every row to it."""
    for row in _python_rows(rows):
        sample = next((row[key] for key in ("chosen", "rejected") if isinstance(row[key], (str, list))), None)
        if sample is None:
            continue
        # Some data sets repeat the last user message in a `prompt` column of text beside whole conversations.
        repeated = isinstance(sample, list) and isinstance(row.get("prompt"), str)
        shared = "prompt" not in row or repeated
        return Schema(_form(sample), shared, len(rows), ("prompt", *unused) if repeated else tuple(unused))
    return Schema("standard", "prompt" not in rows.column_names, len(rows), tuple(unused))


def _check_row(number: int, row: Mapping[str, Any], schema: Schema, faults: _Faults) -> None:
    before = faults.total
    repeated = schema.shared_prompt and "prompt" in row
    for column, value in row.items():
        if column == "prompt" and repeated:
            continue
        for fault in _value_faults(column, value, schema.form):
            faults.add(number, fault)
    if faults.total > before:
        return
    for fault in _pair_faults(row, schema, repeated):
        faults.add(number, fault)


def _value_faults(column: str, value: Any, form: Form | None) -> Iterator[str]:
    if not isinstance(value, (str, list)) or (form is not None and _form(value) != form):
        allowed = (
            _ALLOWED[None] if not isinstance(value, (str, list)) else f"{_ALLOWED[form]}, like the rest of the data"
        )
        yield f"`{column}` is {_described(value)}; it must be {allowed}"
    elif isinstance(value, str):
        if _MESSAGES_AS_TEXT.match(value):
            yield f"`{column}` is text that spells out a list of messages; store the list itself, in JSON or Parquet"
    elif not value:
        yield f"`{column}` is an empty list; it must hold at least one message"
    else:
        for position, message in enumerate(value, 1):
            yield from (f"message {position} of `{column}` {fault}" for fault in _message_faults(message))


def _message_faults(message: Any) -> Iterator[str]:
    if not isinstance(message, dict):
        yield f"is {_described(message)}; it must be an object with `role` and `content`"
        return
    filled = _clean(message)
    if unsupported := [key for key in _UNSUPPORTED_FIELDS if filled.get(key)]:
        yield f"has `{unsupported[0]}`, which Tether does not read yet; remove the row"
    elif not {"role", "content"} <= filled.keys():
        yield f"has the keys {', '.join(filled) or 'none'}; it must have `role` and `content`"
    elif not isinstance(filled["role"], str):
        yield f"has a `role` that is {_described(filled['role'])}; it must be text"
    elif isinstance(filled["content"], list):
        yield "has `content` in parts (a list), which Tether does not read yet; it must be text"
    elif not isinstance(filled["content"], str):
        yield f"has `content` that is {_described(filled['content'])}; it must be text"


def _pair_faults(row: Mapping[str, Any], schema: Schema, repeated: bool) -> Iterator[str]:
    """Faults that show only when the fields of a row, each well formed, are seen together."""
    chosen, rejected = _cleaned(row["chosen"]), _cleaned(row["rejected"])
    if schema.shared_prompt:
        prompt, *_ = split_prompt(chosen, rejected)
        if not prompt:
            yield "`chosen` and `rejected` do not begin alike, so no prompt can be told; add a `prompt` column"
        elif repeated and row["prompt"] not in [message["content"] for message in prompt]:
            yield (
                "`prompt` is text and none of the messages that `chosen` and `rejected` begin with says it; make it a "
                "list of messages, or remove it"
            )
        near = [column for column in schema.unused_columns if column.lower() in (*_PROMPT_LIKE, "prompt")]
        if isinstance(chosen, str) and near:
            yield f"there is no `prompt`, but a column `{near[0]}`; rename it to `prompt`, or remove it"
    elif isinstance(chosen, list) and (prompt := _cleaned(row["prompt"])) == chosen[: len(prompt)]:
        yield "`chosen` repeats the messages of `prompt`; leave them out of one of the two"
    for column, completion in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(completion, list) and completion[-1]["role"] in ("user", "system"):
            yield f"the last message of `{column}` is from the {completion[-1]['role']}; it must be an answer"


def _described(value: Any) -> str:
    match value:
        case None:
            return "missing (null)"
        case bool():
            return f"a truth value ({value})"
        case int() | float():
            return f"a number ({value})"
        case str():
            return f"text ({value[:40]!r}{'…' if len(value) > 40 else ''})"
        case list():
            return "a list of messages" if value and isinstance(value[0], dict) else "a list"
        case dict():
            return f"an object with the keys {', '.join(map(str, value))}"
    return f"a {type(value).__name__}"


def _clean(message: Any) -> dict[str, Any]:
    """A message without the empty fields that Arrow adds where other messages have a value."""
    return {key: value for key, value in message.items() if value is not None}


def _cleaned(value: Any) -> Any:
    """Text as it is; messages cleaned."""
    return [_clean(message) for message in value] if isinstance(value, list) else value


def texts_of(value: str | Messages) -> list[str]:
    """The texts in a prompt or completion: itself, or the content of each message.

    Example:
        >>> texts_of([{"role": "user", "content": "Hi"}])
        ['Hi']
    """
    return [value] if isinstance(value, str) else [message["content"] for message in value]
