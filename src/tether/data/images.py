"""Images of prompts, for vision-language models. Called by `prepare`, and by the rows that it returns.

Rows have TRL's form: a column `images` (a list) or `image`, and prompts whose messages say where the images stand,
`{"type": "image"}` among the parts of their content. Where no message says so, they stand before the first user
message. A prompt of text holds the processor's image token once for each image.

The rest of the data room knows text only. So an image part is written as one character that no text uses, and a
preamble of the chat template turns it back into a part. Pixels are read twice: once here, for the number of tokens, and
then each time a row is asked for, so that they never lie in memory for a whole data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from transformers import ProcessorMixin

from tether.data.render import Rendered
from tether.data.sources import IMAGE_COLUMNS
from tether.data.tokenize import Encoder, Tokenized
from tether.errors import DataError
from tether.types import ImageInputs

# How an image lies in a table, as `datasets` stores it: the file, or where it is.
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
MARK = "\ue000"  # of Unicode's private use area
_TEXTS = ("prompt", "chosen", "rejected", "completion", "completions", "messages", "text")
_SHOWN = 5
# Written for the sandbox that templates run in, where lists cannot be changed.
_PREAMBLE = """\
{%- set tether = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set row = namespace(parts=[]) -%}
{%- for text in message['content'].split('MARK') -%}
{%- if not loop.first -%}{%- set row.parts = row.parts + [{'type': 'image'}] -%}{%- endif -%}
{%- if text or loop.length == 1 -%}{%- set row.parts = row.parts + [{'type': 'text', 'text': text}] -%}{%- endif -%}
{%- endfor -%}
{%- set tether.messages = tether.messages + [dict(message, content=row.parts)] -%}
{%- else -%}
{%- set tether.messages = tether.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = tether.messages -%}
{{- '' }}"""


def parts_template(template: str) -> str:
    """A chat template that is given parts whatever its messages hold: text, and a part of an image for each `MARK`."""
    return _PREAMBLE.replace("MARK", MARK) + template


def reads_images(processing_class: Any) -> bool:
    """Whether a tokenizer or processor can turn images into what a model sees."""
    return isinstance(processing_class, ProcessorMixin) and hasattr(processing_class, "image_processor")


@dataclass(frozen=True)
class Pictures:
    """The images of a data set, and the processor that reads them.

    Args:
        references: for each row, its images: `{"bytes", "path"}` each.
        processor: of the model.
        name: what to call the rows in messages.
        first: number of the first of these rows, from 0.
    """

    references: tuple[list[dict[str, Any]], ...]
    processor: ProcessorMixin
    name: str
    first: int = 0

    def of_row(self, row: int) -> list[dict[str, Any]]:
        """The images of a row, by its number."""
        return self.references[row - self.first]

    @property
    def token_id(self) -> int:
        """Id of the token that stands for a part of an image."""
        found = getattr(self.processor, "image_token_id", None)
        if not isinstance(found, int):
            raise DataError(
                f"{self.name}: {type(self.processor).__name__} does not say which token stands for an image; set its "
                "image_token_id."
            )
        return found

    def prompt_ids(self, row: int, text: str) -> list[int]:
        """Ids of a rendered prompt, in which every image has as many tokens as the model gives it.

        Raises:
            DataError: an image cannot be read, or the processor refuses it.
        """
        try:
            images = [_decoded(reference) for reference in self.of_row(row)]
            call: Any = self.processor
            made = call(text=[text], images=[images], add_special_tokens=False)
        except Exception as error:  # files and processors of many kinds
            raise DataError(
                f"{self.name}: row {row + 1}: its images cannot be read ({str(error).strip().splitlines()[0]}). Check "
                "the files, and that they are as many as the image tokens of the prompt."
            ) from error
        return [int(token) for token in made["input_ids"][0]]

    def with_tokens(self, rows: Sequence[Rendered], found: Sequence[Tokenized], encoder: Encoder) -> list[Tokenized]:
        """The prompts with as many tokens for each image as the model sees of it; see `prompt_ids` for the errors."""
        return [self._with_tokens(row, ids, encoder) for row, ids in zip(rows, found, strict=True)]

    def _with_tokens(self, row: Rendered, ids: Tokenized, encoder: Encoder) -> Tokenized:
        if not self.of_row(row.source_row):
            return ids
        whole = encoder.opened(self.prompt_ids(row.source_row, row.prompt))
        # A prompt that was cut back to what the texts share loses as much here; no image may be in it.
        kept = len(whole) - len(encoder.opened(encoder.encode([row.prompt])[0])) + len(ids.prompt_ids)
        if self.token_id in whole[kept:]:
            return replace(ids, dropped="boundary")
        return replace(ids, prompt_ids=whole[:kept])

    def read_when_asked(self, dataset: Dataset) -> Dataset:
        """The prepared rows, which read their images each time they are asked for."""
        return dataset.with_transform(ImageRows(self.processor, self.token_id))

    def column(self, rows: Sequence[Rendered]) -> pa.Array:
        """The images of rows, as they lie in a table."""
        return pa.array([self.of_row(row.source_row) for row in rows], type=IMAGES)

    def told_apart(self, rows: Sequence[Rendered]) -> list[Rendered]:
        """Rows whose prompts say which images they have: rows that differ in these alone are no duplicates."""
        return [replace(row, prompt=_digest(self.of_row(row.source_row)) + row.prompt) for row in rows]


def _digest(references: Sequence[Mapping[str, Any]]) -> str:
    whole = blake2b(digest_size=16)
    for reference in references:
        whole.update(reference["bytes"] if reference["bytes"] is not None else f"path {reference['path']}".encode())
        whole.update(b"|")
    return whole.hexdigest()


def table_digest(column: pa.ChunkedArray) -> bytes:
    """Of a column of images."""
    return "".join(_digest(references or []) for references in column.to_pylist()).encode()


class ImageRows:
    """What `Dataset.with_transform` calls: reads the images of the rows that are asked for, and only of those."""

    def __init__(self, processor: ProcessorMixin, token_id: int) -> None:
        self.processor, self.token_id = processor, token_id

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Put `image_inputs` (`ImageInputs` or None) in the place of `images`."""
        if "images" not in batch:
            return batch
        rest = {name: values for name, values in batch.items() if name != "images"}
        if "prompt_ids" in batch:
            pairs = zip(batch["images"], batch["prompt_ids"], strict=True)
            rest["image_inputs"] = [self._inputs(references, ids) for references, ids in pairs]
        return rest

    def _inputs(self, references: list[dict[str, Any]] | None, prompt_ids: list[int]) -> ImageInputs | None:
        if not references:
            return None
        # Only the pixels matter here: the text is the least that a processor takes beside them.
        token, call = self._token(), self.processor
        images = [_decoded(reference) for reference in references]
        made: Any = call(text=[token * len(images)], images=[images], return_tensors="pt")  # type: ignore[operator]
        names = tuple(name for name in ("mm_token_type_ids", "token_type_ids") if name in made)
        unused = {"input_ids", "attention_mask", *names}
        types = (torch.tensor(prompt_ids) == self.token_id).long()
        return ImageInputs({name: value for name, value in made.items() if name not in unused}, types, names)

    def _token(self) -> str:
        tokenizer: Any = getattr(self.processor, "tokenizer")  # noqa: B009
        return getattr(self.processor, "image_token", None) or tokenizer.convert_ids_to_tokens(self.token_id)


def _decoded(reference: Mapping[str, Any]) -> Any:
    return ImageFeature().decode_example(dict(reference)).convert("RGB")  # type: ignore[arg-type]


def take_images(rows: Dataset, processor: Any, *, name: str, first: int = 0) -> tuple[Dataset, Pictures | None]:
    """Rows of text alone, and the images that belong to them.

    Args:
        rows: as `load_rows` returns them.
        processor: of the model; rows are returned as they are for one that reads no images.
        name: what to call these rows in messages.
        first: number of the first row, from 0.

    Returns:
        The rows, each image part as `MARK` in its text; and the images, None where the rows have no such column.

    Raises:
        DataError: parts that are neither text nor image, images in completions, or another number of images than of
            image parts. The message names the rows.
    """
    column = next((column for column in IMAGE_COLUMNS if column in rows.column_names), None)
    references = _references(rows, column)
    if not reads_images(processor):
        if any(references):
            row = next(number for number, found in enumerate(references, first + 1) if found)
            raise DataError(
                f"{name}: row {row}: the column `{column}` holds values, and Tether does not read it yet with a "
                "tokenizer alone: pass the model's processor as processing_class, or remove the column if the rows are "
                "complete without it."
            )
        return rows, None
    texts = [text for text in _TEXTS if text in rows.column_names]
    plain = rows.select_columns(texts).with_format(None)[:]
    token = getattr(processor, "image_token", None)
    faults: list[str] = []
    for number in range(len(rows)):
        row = {text: plain[text][number] for text in texts}
        try:
            flat = {text: _flat(value) for text, value in row.items()}
            plain_row = _placed(flat, len(references[number]), token)
        except ValueError as fault:
            faults.append(f"row {first + number + 1}: {fault}")
            continue
        for text, value in plain_row.items():
            plain[text][number] = value
    if faults:
        more = f" ({len(faults)} faults, the first {_SHOWN} shown)" if len(faults) > _SHOWN else ""
        raise DataError(f"{name}: {'; '.join(faults[:_SHOWN])}{more}. Correct or remove them (rows count from 1).")
    columns: dict[str, Any] = {text: pa.array(plain[text]) for text in texts}
    others = [other for other in rows.column_names if other not in (*texts, column)]
    if others:
        columns |= {other: rows.select_columns(others).with_format("arrow")[:][other] for other in others}
    pictures = Pictures(tuple(references), processor, name, first) if any(references) else None
    return Dataset(pa.table({name: columns[name] for name in rows.column_names if name in columns})), pictures


def _references(rows: Dataset, column: str | None) -> list[list[dict[str, Any]]]:
    if column is None:
        return [[] for _ in range(len(rows))]
    values = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    return [_reference_list(value) for value in values]


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
            case "image":
                raise ValueError("an image part holds its image; put images into the column `images`")
            case kind:
                raise ValueError(
                    f"a part of `content` has the type {kind!r}; allowed are {{'type': 'text', 'text': …}} and "
                    "{'type': 'image'}"
                )
    return "".join(pieces)


def _placed(row: dict[str, Any], images: int, token: str | None) -> dict[str, Any]:
    """The row with a mark for each image where no message says where they stand; and the check of their number."""
    where = ("prompt",) if "prompt" in row else tuple(row)
    if images and {"messages", "text"} & row.keys():
        raise ValueError("images need to know where the prompt ends; give `prompt` and `completion`")
    for name, value in row.items():
        if name not in where and _marks(value):
            raise ValueError(f"`{name}` has an image part; images are read from the prompt only")
    placed = dict(row)
    for name in where:
        value = row[name]
        if isinstance(value, str):
            found = value.count(token) if token else 0
            if found != images and (images or name == "prompt"):
                raise ValueError(f"`{name}` is text with {found} image tokens {token!r} for {images} images")
        elif isinstance(value, list):
            placed[name] = value if _marks(value) or not images else _before_first_user(value, images)
            if _marks(placed[name]) != images:
                raise ValueError(f"`{name}` has {_marks(value)} image parts for {images} images")
    return placed


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
