"""Images of prompts, for vision-language models. Called by `prepare`, and by the rows that it returns.

`image_parts` takes the images out of the rows and leaves a mark in the text for each; a preamble of the chat template
turns a mark back into a part. Pixels are read twice: once here, for the number of tokens, and then each time a row is
asked for, so that they never lie in memory for a whole data set.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from transformers import ProcessorMixin

from tether.data.images.parts import (
    IMAGES,
    MARK,
    References,
    as_text,
    fault_message,
    first_with_images,
    identity,
    image_column,
)
from tether.data.images.sizes import sized
from tether.data.text.render import Rendered
from tether.data.text.tokenize import Encoder, Tokenized
from tether.errors import DataError
from tether.types import ImageInputs

# What Pillow warns with of an image of more than 89 million pixels; of twice as many it raises by itself.
_BOMB = "Image size .* could be decompression bomb"
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
        references: number of a row, from 0, to its images: `{"bytes", "path"}` each.
        processor: of the model.
        name: what to call the rows in messages.
    """

    references: Mapping[int, References]
    processor: ProcessorMixin
    name: str

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
            images = [_decoded(reference, self.processor) for reference in self.references[row]]
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
        if not self.references[row.source_row]:
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
        return pa.array([self.references[row.source_row] for row in rows], type=IMAGES)

    def told_apart(self, rows: Sequence[Rendered]) -> list[Rendered]:
        """Rows whose prompts say which images they have: rows that differ in these alone are no duplicates."""
        return [replace(row, prompt=identity(self.references[row.source_row]) + row.prompt) for row in rows]


def table_digest(column: pa.ChunkedArray) -> bytes:
    """Of a column of images."""
    return ";".join(identity(references) for references in column.to_pylist()).encode()


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
        images = [_decoded(reference, call) for reference in references]
        made: Any = call(text=[token * len(images)], images=[images], return_tensors="pt")  # type: ignore[operator]
        names = tuple(name for name in ("mm_token_type_ids", "token_type_ids") if name in made)
        unused = {"input_ids", "attention_mask", *names}
        types = (torch.tensor(prompt_ids) == self.token_id).long()
        return ImageInputs({name: value for name, value in made.items() if name not in unused}, types, names)

    def _token(self) -> str:
        tokenizer: Any = getattr(self.processor, "tokenizer")  # noqa: B009
        return getattr(self.processor, "image_token", None) or tokenizer.convert_ids_to_tokens(self.token_id)


def _decoded(reference: Mapping[str, Any], processor: Any) -> Any:
    with warnings.catch_warnings():
        # A few bytes can unpack to an image that fills the memory.
        warnings.filterwarnings("error", _BOMB)
        image = ImageFeature().decode_example(dict(reference)).convert("RGB")  # type: ignore[arg-type]
    return sized(image, processor)


def require_processor(rows: Dataset, processor: Any, *, name: str, first: int = 0) -> None:
    """Refuse rows with images for a tokenizer that reads none.

    Raises:
        DataError: there are images; the message names the first row that has one.
    """
    column = None if reads_images(processor) else image_column(rows)
    if column is not None:
        row = first + (first_with_images(rows, column) or 0)
        raise DataError(
            f"{name}: row {row}: the column `{column}` holds images, and a tokenizer alone "
            f"({type(processor).__name__}) does not read them. Give the model's processor (as processing_class in "
            "Python; a model's folder holds it as processor_config.json or preprocessor_config.json), or remove the "
            "column if the rows are complete without it."
        )


def take_images(rows: Dataset, processor: Any, *, name: str, first: int = 0) -> tuple[Dataset, Pictures | None]:
    """Rows of text alone, and the images that belong to them.

    Args:
        rows: as `load_rows` returns them.
        processor: of the model; rows are returned as they are for one that reads no images.
        name: what to call these rows in messages.
        first: number of the first row, from 0.

    Returns:
        The rows, each image part as `MARK` in its text; and the images, None where the rows have none.

    Raises:
        DataError: parts that are neither text nor image, images in completions, or another number of images than of
            image parts. The message names the rows.
    """
    require_processor(rows, processor, name=name, first=first)
    if not reads_images(processor):
        return rows, None
    text = as_text(rows, getattr(processor, "image_token", None))
    if text.faults:
        raise DataError(fault_message({first + row: fault for row, fault in text.faults.items()}, name))
    pictures = Pictures(dict(enumerate(text.references, first)), processor, name) if any(text.references) else None
    return text.rows, pictures
