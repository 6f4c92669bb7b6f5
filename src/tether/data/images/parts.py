"""Images of rows as the code for text deals with them: where they are, which they are, and where they stand in the
text. No pixel is read here. Called by `images`, `check` and `split`.

Rows have TRL's form: a column `images` (a list) or `image`, and prompts whose messages say where the images stand,
`{"type": "image"}` among the parts of their content. Where no message says so, they stand before the first user
message. A prompt of text holds the processor's image token once for each image.

The rest of the data room knows text only. So an image part is written as one character that no text uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from tether.data.rows.columns import BATCH_ROWS, IMAGE_COLUMNS
from tether.data.rows.values import SHOWN_FAULTS
from tether.redact import masked

# How an image lies in a table, as `datasets` stores it: the file, or where it is.
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
MARK = "\ue000"  # of Unicode's private use area
References = list[dict[str, Any]]
_ELSEWHERE = re.compile(r"(?!file:|zip:|tar:)[A-Za-z][A-Za-z0-9+.-]+://")
_TEXTS = ("prompt", "chosen", "rejected", "completion", "completions", "messages", "text")


def image_column(rows: Dataset) -> str | None:
    """The column that holds images; None where there is none, or where it is empty in every row."""
    column = next((column for column in IMAGE_COLUMNS if column in rows.column_names), None)
    return None if column is None or first_with_images(rows, column) is None else column


def first_with_images(rows: Dataset, column: str) -> int | None:
    """Number, from 1, of the first row with an image."""
    for start in range(0, len(rows), BATCH_ROWS):
        for number, found in enumerate(references_of(rows, column, start, start + BATCH_ROWS), start + 1):
            if found:
                return number
    return None


def references_of(rows: Dataset, column: str, start: int = 0, stop: int | None = None) -> list[References]:
    """The images of the rows `start` to `stop`, as `{"bytes", "path"}` each; none is decoded."""
    stored = rows.select_columns([column]).with_format("arrow")
    batch = stored[start : min(len(rows) if stop is None else stop, len(rows))]
    return [_reference_list(value) for value in batch[column].to_pylist()]


def identity(references: Sequence[Mapping[str, Any]] | None) -> str:
    """What tells the images of one row from those of another: a hash of the files in the row, or where they are.

    Example:
        >>> identity([]) == identity(None) == ""
        True
        >>> identity([{"bytes": None, "path": "a.png"}]) == identity([{"bytes": None, "path": "b.png"}])
        False
    """
    if not references:
        return ""
    whole = blake2b(digest_size=16)
    for reference in references:
        whole.update(reference["bytes"] if reference["bytes"] is not None else f"path {reference['path']}".encode())
        whole.update(b"|")
    return whole.hexdigest()


def identities(rows: Dataset) -> list[str]:
    """`identity` of the images of every row; the files of a few rows are in memory at a time."""
    column = image_column(rows)
    if column is None:
        return [""] * len(rows)
    starts = range(0, len(rows), BATCH_ROWS)
    return [identity(found) for start in starts for found in references_of(rows, column, start, start + BATCH_ROWS)]


def missing_file(references: Sequence[Mapping[str, Any]]) -> str | None:
    """The first file of some images that is not there; None where all are, as far as can be told without reading."""
    paths = (one["path"] for one in references if one["bytes"] is None)
    return next((path for path in paths if not path or ("://" not in path and not Path(path).is_file())), None)


def address(references: Sequence[Mapping[str, Any]]) -> str | None:
    """The first image of some that another machine has; None where all lie here."""
    paths = (str(one["path"] or "") for one in references if one["bytes"] is None)
    return next((path for path in paths if _ELSEWHERE.match(path.rpartition("::")[2])), None)


def has_parts(rows: Dataset) -> bool:
    """Whether the content of messages is in parts anywhere, as conversations with images have it."""
    schema = rows.features.arrow_schema
    return any(_in_parts(schema.field(text).type) for text in _TEXTS if text in rows.column_names)


def _in_parts(kind: pa.DataType) -> bool:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if not pa.types.is_struct(kind) or (at := kind.get_field_index("content")) < 0:
        return False
    return pa.types.is_list(kind.field(at).type) or pa.types.is_large_list(kind.field(at).type)


@dataclass(frozen=True)
class TextRows:
    """Rows of text alone, and what was taken out of them.

    Args:
        rows: without the column of images, each image part as `MARK` in its text.
        references: for each row, its images.
        faults: number of a row, from 1, to what is wrong with its images or parts; the texts of such a row are null.
    """

    rows: Dataset
    references: tuple[References, ...]
    faults: dict[int, str] = field(default_factory=dict)


def as_text(rows: Dataset, token: str | None = None) -> TextRows:
    """Take the images out of rows.

    Args:
        rows: as `load_rows` returns them.
        token: of a processor, for an image in a prompt of text; None where it is not known, so that images of such
            prompts are not counted.
    """
    column = next((column for column in IMAGE_COLUMNS if column in rows.column_names), None)
    references = [[] for _ in range(len(rows))] if column is None else references_of(rows, column)
    texts = [text for text in _TEXTS if text in rows.column_names]
    plain = rows.select_columns(texts).with_format(None)[:]
    faults: dict[int, str] = {}
    for number in range(len(rows)):
        row: dict[str, Any] = {text: plain[text][number] for text in texts}
        try:
            if far := address(references[number]):
                raise ValueError(
                    f"its image is at an address, `{masked(far)}`, and rows do not decide what is fetched; save the "
                    "image, and give its file"
                )
            row = _placed({text: _flat(value) for text, value in row.items()}, len(references[number]), token)
        except ValueError as fault:
            faults[number + 1] = str(fault)
            row = dict.fromkeys(texts)
        for text, value in row.items():
            plain[text][number] = value
    columns: dict[str, Any] = {text: pa.array(plain[text]) for text in texts}
    others = [other for other in rows.column_names if other not in (*texts, column)]
    if others:
        columns |= {other: rows.select_columns(others).with_format("arrow")[:][other] for other in others}
    table = pa.table({name: columns[name] for name in rows.column_names if name in columns})
    return TextRows(Dataset(table), tuple(references), faults)


def fault_message(faults: Mapping[int, str], name: str) -> str:
    """One paragraph about the faults of `TextRows`."""
    shown = [f"row {number}: {fault}" for number, fault in list(faults.items())[:SHOWN_FAULTS]]
    more = f" ({len(faults)} faults, the first {SHOWN_FAULTS} shown)" if len(faults) > SHOWN_FAULTS else ""
    return f"{name}: {'; '.join(shown)}{more}. Correct or remove them (rows count from 1)."


def _reference_list(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if isinstance(value, list):
        return [one for item in value for one in _reference_list(item)]
    if isinstance(value, str):
        return [{"bytes": None, "path": value}] if value else []
    if isinstance(value, bytes):
        return [{"bytes": value, "path": None}]
    return [{"bytes": value.get("bytes"), "path": value.get("path")}]


def _flat(value: Any) -> Any:
    """Messages with text for content, each image part a `MARK`."""
    if not isinstance(value, list):
        if isinstance(value, str) and MARK in value:
            raise ValueError(f"its text holds the character {MARK!r}, which stands for images here; remove it")
        return value
    messages = []
    for message in value:
        if isinstance(message, (list, str)):  # one of several completions
            messages.append(_flat(message))
            continue
        content = message.get("content") if isinstance(message, Mapping) else None
        messages.append({**message, "content": _flat_content(content)} if content is not None else message)
    return messages


def _flat_content(content: Any) -> Any:
    if not isinstance(content, list):
        return _flat(content)
    pieces = []
    for part in content:
        filled = {key: item for key, item in part.items() if item is not None} if isinstance(part, Mapping) else {}
        match filled.get("type"):
            case "text" if isinstance(filled.get("text"), str):
                pieces.append(_flat(filled["text"]))
            case "image" if filled.keys() == {"type"}:
                pieces.append(MARK)
            case kind:
                raise ValueError(
                    f"a part of `content` has the type {kind!r}; allowed are {{'type': 'text', 'text': …}} and "
                    "{'type': 'image'}"
                )
    return "".join(pieces)


def _placed(row: dict[str, Any], images: int, token: str | None) -> dict[str, Any]:
    """The row with a mark for each image where no message says where they stand; and the check of their number."""
    where = ("prompt",) if "prompt" in row else tuple(row)
    if images and "text" in row:
        raise ValueError("images need to know where the prompt ends; give `prompt` and `completion`")
    for name, value in row.items():
        if name not in where and _marks(value):
            raise ValueError(f"`{name}` has an image part; images are read from the prompt only")
    placed = dict(row)
    for name in where:
        value = row[name]
        if isinstance(value, str):
            found = value.count(token) if token else images
            if found != images and (images or name == "prompt"):
                raise ValueError(f"`{name}` is text with {found} image tokens {token!r} for {images} images")
        elif isinstance(value, list):
            placed[name] = value if _marks(value) or not images else _before_first_user(value, images)
            if _marks(placed[name]) != images:
                raise ValueError(f"`{name}` has {_marks(value)} image parts for {images} images")
    if images and isinstance(whole := placed.get("messages"), list) and _marks(_until_answer(whole)) != images:
        raise ValueError("`messages` has an image part behind the first answer; images are read from the prompt only")
    return placed


def _until_answer(messages: list[Any]) -> list[Any]:
    """What a conversation says before the assistant's first turn."""
    return list(takewhile(lambda message: message.get("role") != "assistant", messages))


def _marks(value: Any) -> int:
    if not isinstance(value, list):
        return 0
    contents = (message.get("content") for message in value if isinstance(message, Mapping))
    found = sum(content.count(MARK) for content in contents if isinstance(content, str))
    return found + sum(map(_marks, value))


def _before_first_user(messages: list[Any], images: int) -> list[Any]:
    for place, message in enumerate(messages):
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            return [
                *messages[:place],
                {**message, "content": MARK * images + message["content"]},
                *messages[place + 1 :],
            ]
    return messages
