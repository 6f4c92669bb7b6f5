"""One row as the model will see it: every token with its role, its part and its mask. Called by the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.data.images.inputs import parts_template, reads_images, take_images
from tether.data.prepare.prepare import Prepared, prepare
from tether.data.prepare.report import Report
from tether.data.roles import Roles, roles_of
from tether.data.rows.schema import preferences, read_preferences, unpaired
from tether.data.text.template import chat_template, text_tokenizer
from tether.data.text.tokenize import Encoder
from tether.data.text.truncate import TruncationMode, kept_prompt
from tether.types import Kind

Part = Literal["prompt", "completion"]
# What the loss is of: the scored tokens of completions; those, and the prompt's; or the last token of a whole text.
Counted = Literal["completions", "texts", "ends"]


@dataclass(frozen=True)
class Token:
    """A token of a row.

    Args:
        id: its number.
        text: what it stands for; parts of a character that no token holds alone are shown as the tokenizer writes them.
        part: prompt or completion.
        scored: it counts in the loss.
        special: it is one of the tokenizer's special tokens.
        role: who says it: `system`, `user`, `assistant`, `tool`; empty for text, which no one in particular says.
    """

    id: int
    text: str
    part: Part
    scored: bool
    special: bool
    role: str = ""


def shown_row(
    rows: Dataset,
    number: int,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    kind: Kind = "pair",
    truncation_mode: TruncationMode = "keep_start",
    max_length: int | None = None,
    counted: Counted = "completions",
    **options: Any,
) -> tuple[list[list[list[Token]]], Report]:
    """One row as the model is given it.

    Args:
        rows: as `load_rows` returns them.
        number: of the row, from 1.
        processing: the model's tokenizer or processor.
        kind: see `prepare`, as for the others.
        truncation_mode: see `prepare`.
        max_length: see `prepare`.
        counted: what the run's loss is of: `completions`, `texts` (prompts too, as ORPO scores them) or `ends` (the
            last token of each, where a reward is read).
        options: the others of `prepare`.

    Returns:
        For each row that it becomes (a pair that is read as labelled completions becomes two), the tokens of the prompt
        and those of each completion; and the report.

    Raises:
        DataError: it cannot be read, or would be dropped.
    """
    options = {**options, "kind": kind, "truncation_mode": truncation_mode, "name": f"row {number}"}
    one = rows.select([number - 1])
    prepared = prepare(one, processing, max_length=max_length, **options)
    # Roles are told from the whole conversation, and cut as the tokens are.
    whole = prepared if max_length is None else prepare(one, processing, max_length=None, **options)
    roles = _roles(one, whole, processing, kind, options)
    shown = []
    for row in prepared.dataset.with_format(None).to_list():
        own = roles.get(_first_completion(row, roles))
        cut = own and [
            kept_prompt(own[0], len(row["prompt_ids"]), truncation_mode) or [],
            *(mine[: len(ids)] for mine, ids in zip(own[1:], row["completion_ids"], strict=True)),
        ]
        shown.append(tokens_of(row, text_tokenizer(processing), cut, counted, _image_token(processing)))
    return shown, prepared.report


def _roles(
    one: Dataset, whole: Prepared, processing: Any, kind: Kind, options: Mapping[str, Any]
) -> dict[tuple[int, ...], list[Roles]]:
    """The roles of each prepared row, by the tokens of its completions; none for text."""
    text, _ = take_images(one, processing, name=str(options["name"]))
    turns = options.get("turns", "all")
    schema = read_preferences(text, kind=kind, turns=turns, name=str(options["name"]))
    if schema.form == "standard":
        return {}
    template = chat_template(processing)
    template = parts_template(template) if reads_images(processing) else template
    encoder = Encoder(text_tokenizer(processing), template=template)
    records = preferences(text, schema, turns=turns)
    if kind == "unpaired" and schema.kind == "pair":
        records = [row for record in records for row in unpaired(record)]
    found = {}
    for record, row in zip(records, whole.dataset.with_format(None).to_list(), strict=False):
        prompt, completions = row["prompt_ids"], row["completion_ids"]
        image = _image_token(processing)
        found[tuple(chain(*completions))] = roles_of(record, prompt, completions, encoder, template, image)
    return found


def _first_completion(row: Mapping[str, Any], roles: Mapping[tuple[int, ...], Any]) -> tuple[int, ...]:
    """The key in `roles` of a row whose completions may have been cut."""
    if len(roles) < 2:
        return next(iter(roles), ())
    own = row["completion_ids"][0]
    return next((key for key in roles if list(key[: len(own)]) == own), ())


def _image_token(processing: Any) -> int | None:
    """Id of the token that stands for a part of an image."""
    return getattr(processing, "image_token_id", None)


def tokens_of(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    roles: Sequence[Roles] | None = None,
    counted: Counted = "completions",
    image_token: int | None = None,
) -> list[list[Token]]:
    """The tokens of a prepared row: those of the prompt, then those of each completion.

    Args:
        row: of `Prepared.dataset`.
        tokenizer: that made it.
        roles: of the prompt's tokens and of each completion's; None for text.
        counted: see `shown_row`.
        image_token: id of the token that stands for a part of an image, which no one writes.
    """
    completions = row["completion_ids"]
    masks = row.get("scored") or [[True] * len(ids) for ids in completions]
    if counted == "ends":
        masks = [[False] * (len(ids) - 1) + [True] for ids in completions]
    # Nothing predicts the first token.
    asked = [counted == "texts" and place > 0 and token != image_token for place, token in enumerate(row["prompt_ids"])]
    said = roles or [[""] * len(ids) for ids in (row["prompt_ids"], *completions)]
    prompt = _tokens(row["prompt_ids"], asked, said[0], "prompt", tokenizer)
    parts = zip(completions, masks, said[1:], strict=True)
    return [prompt, *(_tokens(ids, mask, own, "completion", tokenizer) for ids, mask, own in parts)]


def _tokens(
    ids: list[int], mask: list[bool], roles: Roles, part: Part, tokenizer: PreTrainedTokenizerBase
) -> list[Token]:
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return [
        Token(token, token_text(token, tokenizer), part, scored, token in special, role)
        for token, scored, role in zip(ids, mask, roles, strict=True)
    ]


def token_text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a token stands for; part of a character as the tokenizer writes it."""
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    if text and "\ufffd" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token))
