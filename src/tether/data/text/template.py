"""The chat template of a model, applied to many conversations at once. Called by `render`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.errors import DataError
from tether.types import Messages, Preference

_PROBE = "tether-probe"


def text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one inside a processor."""
    return cast(PreTrainedTokenizerBase, getattr(processing_class, "tokenizer", processing_class))


def chat_template(processing_class: PreTrainedTokenizerBase | ProcessorMixin, *, name: str = "data") -> str:
    """The chat template that conversations are rendered with.

    Args:
        processing_class: a tokenizer, or a processor that has one.
        name: what to call the rows in messages.

    Returns:
        The template's source.

    Raises:
        DataError: there is none.
    """
    try:
        return text_tokenizer(processing_class).get_chat_template()
    except ValueError as error:
        inherited = getattr(processing_class, "chat_template", None)
        if isinstance(inherited, str):
            return inherited
        raise DataError(
            f"{name}: the rows are conversations, but the tokenizer has no chat template to write them as text. Set "
            "tokenizer.chat_template to the model's own, take the tokenizer of an instruction-tuned model, or give "
            "prompt, chosen and rejected as text."
        ) from error


def template_hash(template: str) -> str:
    """A short content hash of a chat template, for reports."""
    return sha256(template.encode()).hexdigest()[:16]


def turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """What the template writes after the content of an assistant's last message, such as `<|im_end|>` and a newline.

    Empty for a template that writes nothing there, or that refuses the probe.
    """
    probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = cast(str, tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False))
    except Exception:  # a template is a program written by others
        return ""
    return text.rpartition(_PROBE)[2] if _PROBE in text else ""


def conversation(record: Preference, k: int) -> Messages:
    """Prompt and completion k as one conversation."""
    prompt, completion = cast(Messages, record.prompt), cast(Messages, record.completions[k])
    if opening(record) != "continue_final_message":
        return prompt + completion
    joined = {**completion[0], "content": prompt[-1]["content"] + completion[0]["content"]}
    return [*prompt[:-1], joined, *completion[1:]]


class Writer:
    """Writes conversations through a chat template, in as few calls as their arguments allow.

    Args:
        tokenizer: whose special tokens the template uses.
        template: the chat template.
        name: what to call the rows in messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> None:
        self.tokenizer, self.template, self.name = tokenizer, template, name

    def __call__(self, conversations: Sequence[tuple[Preference, Messages, str]]) -> list[str]:
        """The text of each conversation of a record, opened as the third item says; see `opening`.

        Raises:
            DataError: the template refuses one.
        """
        texts = [""] * len(conversations)
        groups: dict[tuple[str, str], list[int]] = {}
        for place, (record, messages, opened) in enumerate(conversations):
            if messages:
                groups.setdefault((opened, _arguments(record)), []).append(place)
        for (opened, _), places in groups.items():
            members = [conversations[place][:2] for place in places]
            first = members[0][0]
            options = {**first.chat_template_kwargs, **({"tools": first.tools} if first.tools else {})}
            options |= {opened: True} if opened else {}
            for place, text in zip(places, self._apply(members, options), strict=True):
                texts[place] = text
        return texts

    def _apply(self, conversations: Sequence[tuple[Preference, Messages]], options: dict[str, Any]) -> list[str]:
        """Render many conversations at once; one by one only to find the row that the template refuses."""
        options = {**options, "chat_template": self.template, "tokenize": False}
        apply = self.tokenizer.apply_chat_template
        try:
            return cast(list[str], apply([messages for _, messages in conversations], **options))
        except Exception as failure:  # a template is a program written by others: it may raise anything
            for record, messages in conversations:
                try:
                    apply(messages, **options)
                except Exception as error:
                    roles = ", ".join(message["role"] for message in messages)
                    raise DataError(
                        f"{self.name}: row {record.source_row + 1}: the chat template refuses the conversation "
                        f"({error}); its roles are {roles}. Change the roles to what the template allows, or set "
                        "another template."
                    ) from error
            raise DataError(f"{self.name}: the chat template failed on a batch of rows: {failure}") from failure


def _arguments(record: Preference) -> str:
    """Equal for records that one call can render together."""
    if not record.tools and not record.chat_template_kwargs:
        return ""
    return json.dumps([record.tools, dict(record.chat_template_kwargs)], sort_keys=True, default=str)


def opening(record: Preference) -> str:
    """How the end of the prompt is rendered: opened for an answer, left open within one, or closed."""
    last = cast(Messages, record.prompt)[-1]["role"] if record.prompt else ""
    first_roles = {cast(Messages, completion)[0]["role"] for completion in record.completions} or {"assistant"}
    if first_roles & {"user", "system", "tool"}:
        return ""
    return "continue_final_message" if last in first_roles else "add_generation_prompt"
