"""Images that stand in the parts of messages, put into the column `images`, where rows of TRL's form have them. Called
by `sources`.

A part holds its image as transformers' templates (`image`, `path`, `url`, `base64`), OpenAI (`image_url`) or
LLaMA-Factory's v1 rows (`value`) write it. Nothing is fetched: an address stays one, which rows may not have.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from datasets import Dataset

from tether.data.rows.columns import IMAGE_COLUMNS
from tether.data.rows.values import Faults, described
from tether.errors import DataError

Row = dict[str, Any]
_KEYS = ("image", "path", "url", "base64", "image_url", "value")
_CONTENT = ("content", "value")
_FILE, _DATA = "file://", "data:"


def may_hold_images(rows: Dataset | list[Row]) -> bool:
    """Whether a part of a message may hold an image: by the columns of a table, by the rows of a list."""
    if isinstance(rows, list):
        return any(isinstance(value, list) and _holds(value) for row in rows for value in row.values())
    schema = rows.features.arrow_schema
    return any(_may_hold(schema.field(column).type) for column in rows.column_names if column not in IMAGE_COLUMNS)


def lifted(rows: Iterable[Row], name: str, first: int = 0) -> list[Row]:
    """Rows with the images of their parts in the column `images`, and parts that say where they stand.

    Args:
        rows: plain dictionaries.
        name: what to call them in messages.
        first: number of the first row, from 0.

    Raises:
        DataError: a part holds no image that can be read, or the two answers of a row show different ones.

    Example:
        >>> question = [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]
        >>> lifted([{"prompt": question}], "rows")
        [{'prompt': [{'role': 'user', 'content': [{'type': 'image'}]}], 'images': ['a.png']}]
    """
    faults, done, total = Faults(), [], 0
    for total, row in enumerate(rows, 1):
        try:
            done.append(_lifted(row))
        except ValueError as fault:
            faults.add(first + total, str(fault))
    if faults.total:
        raise DataError(faults.message(name, total))
    return done


def _may_hold(kind: pa.DataType) -> bool:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if not pa.types.is_struct(kind):
        return False
    contents = [kind.field(at).type for name in _CONTENT if (at := kind.get_field_index(name)) >= 0]
    parts = [one.value_type for one in contents if pa.types.is_list(one) or pa.types.is_large_list(one)]
    return any(pa.types.is_struct(part) and any(part.get_field_index(key) >= 0 for key in _KEYS) for part in parts)


def _holds(value: list[Any]) -> bool:
    for item in value:
        if isinstance(item, list):
            if _holds(item):
                return True
        elif isinstance(item, Mapping):
            parts = [part for key in _CONTENT if isinstance(item.get(key), list) for part in item[key]]
            if any(isinstance(part, Mapping) and any(part.get(key) is not None for key in _KEYS) for part in parts):
                return True
    return False


def _lifted(row: Row) -> Row:
    found: dict[str, list[Any]] = {}
    done = dict(row)
    for column, value in row.items():
        if isinstance(value, list) and column not in IMAGE_COLUMNS:
            done[column] = _emptied(value, images := [])
            if images:
                found[column] = images
    if all(image is None for images in found.values() for image in images):
        return done
    own = next((column for column in IMAGE_COLUMNS if row.get(column) is not None), IMAGE_COLUMNS[0])
    beside = row.get(own) or []
    columns = ["prompt"] if "prompt" in found else list(found)
    shown = [_in_order(found[column], beside if isinstance(beside, list) else [beside]) for column in columns]
    if any(images != shown[0] for images in shown):
        raise ValueError(f"`{columns[0]}` and `{columns[1]}` show different images; a row's images are its prompt's")
    return {**done, own: shown[0]}


def _in_order(images: list[Any], beside: list[Any]) -> list[Any]:
    """Images of the parts, one after another; a part without its own takes the next of the column."""
    left = list(beside)
    return [left.pop(0) if image is None and left else image for image in images] + left


def _emptied(messages: list[Any], images: list[Any]) -> list[Any]:
    """Messages whose image parts say no more than that; their images, None for one without, are added to `images`."""
    return [
        _emptied(item, images)
        if isinstance(item, list)
        else {
            key: [_part(part, images) for part in value] if key in _CONTENT and isinstance(value, list) else value
            for key, value in item.items()
        }
        if isinstance(item, Mapping)
        else item
        for item in messages
    ]


def _part(part: Any, images: list[Any]) -> Any:
    filled = {key: item for key, item in part.items() if item is not None} if isinstance(part, Mapping) else {}
    if filled.keys() == {"type", "value"} and filled["type"] == "text":
        return {"type": "text", "text": filled["value"]}
    if filled.get("type") not in ("image", "image_url"):
        return part
    if unread := sorted(filled.keys() - {"type", "text", *_KEYS} | ({"text"} if filled.get("text") else set())):
        raise ValueError(
            f"an image part has `{unread[0]}`, which is not read; take it out (sizes of images are `data.images` of a "
            "run file)"
        )
    given = [key for key in _KEYS if key in filled]
    if len(given) > 1:
        raise ValueError(f"an image part has `{given[0]}` and `{given[1]}`; leave one of them out")
    images.append(_image(filled[given[0]], given[0]) if given else None)
    return {"type": "image"}


def _image(value: Any, key: str) -> Any:
    """What stands for an image in the column: a path or address, bytes, or an image in memory."""
    if isinstance(value, Mapping) and value.keys() <= {"url"}:
        value = value.get("url")
    if isinstance(value, str) and (key == "base64" or value.startswith(_DATA)):
        try:
            return {"bytes": b64decode(value.partition("base64,")[2] or value, validate=True), "path": None}
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"`{key}` of an image part is not base64 ({error}); write the image's file so") from error
    if isinstance(value, str):
        return unquote(value.removeprefix(_FILE)) if value.startswith(_FILE) else value
    if isinstance(value, bytes) or hasattr(value, "save"):
        return value
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        return dict(value)
    raise ValueError(f"`{key}` of an image part is {described(value)}; it must be a file's path, or the image")
