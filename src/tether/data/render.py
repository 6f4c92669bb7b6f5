"""From records to text, with the tokenizer's chat template where rows are conversations. Called by `prepare`.

The prompt is rendered with the template's generation prompt, each completion as part of the whole conversation, as in
TRL's DPO trainer. Where the prompt ends in an assistant message and the completion begins with one, the completion
continues that message (`continue_final_message`); TRL's DPO trainer makes it a second assistant turn, which many
templates refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.errors import DataError
from tether.types import Messages, Preference

_PROBE = "tether-probe"


@dataclass(frozen=True)
class Rendered:
    """A preference as text.

    Args:
        prompt: what the model is given.
        texts: prompt and completion together, one text per completion.
        source_row: number of the row in the data it came from, from 0.
        templated: a chat template wrote the text, so special tokens are already in it.
        given_boundary: the data says where the prompt ends; False where the prompt is only what completions share.
    """

    prompt: str
    texts: tuple[str, ...]
    source_row: int
    templated: bool = False
    given_boundary: bool = True

    @property
    def round_trips(self) -> bool:
        """Whether every text begins with the prompt; templates that render it otherwise in a conversation exist."""
        return all(text.startswith(self.prompt) for text in self.texts)

    @property
    def completions(self) -> tuple[str, ...]:
        """What follows the prompt in each text; has a meaning only where `round_trips`."""
        return tuple(text[len(self.prompt) :] for text in self.texts)


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


def render(
    records: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    given_boundary: bool = True,
    name: str = "data",
) -> list[Rendered]:
    """Write records as text; conversations through the chat template.

    Args:
        records: all text, or all conversations.
        tokenizer: whose special tokens the template uses.
        template: chat template, required for conversations; see `chat_template`.
        given_boundary: False where the prompt was taken from what the completions share.
        name: what to call the rows in messages.

    Returns:
        One text form per record, in order.

    Raises:
        DataError: the template refuses a conversation; the message names the row.
    """
    if template is None:
        plain = [(cast(str, r.prompt), cast(tuple[str, ...], r.completions), r.source_row) for r in records]
        return [Rendered(p, tuple(p + c for c in cs), row, False, given_boundary) for p, cs, row in plain]
    groups: dict[str, list[tuple[Preference, Messages]]] = {}
    for record in records:
        groups.setdefault(_opening(record), []).append((record, cast(Messages, record.prompt)))
    prompts: dict[int, str] = {}
    for opening, members in groups.items():
        options: dict[str, Any] = {opening: True} if opening else {}
        texts = _apply(tokenizer, template, members, name, **options)
        prompts |= {record.source_row: text for (record, _), text in zip(members, texts, strict=True)}
    whole = [(record, _conversation(record, k)) for record in records for k in range(len(record.completions))]
    texts = iter(_apply(tokenizer, template, whole, name))
    return [
        Rendered(prompts[r.source_row], tuple(next(texts) for _ in r.completions), r.source_row, True) for r in records
    ]


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


def _opening(record: Preference) -> str:
    """How the end of the prompt is rendered: opened for an answer, left open within one, or closed."""
    first_roles = {cast(Messages, completion)[0]["role"] for completion in record.completions}
    if first_roles & {"user", "system", "tool"}:
        return ""
    last = cast(Messages, record.prompt)[-1]["role"]
    return "continue_final_message" if last in first_roles else "add_generation_prompt"


def _conversation(record: Preference, k: int) -> Messages:
    prompt, completion = cast(Messages, record.prompt), cast(Messages, record.completions[k])
    if _opening(record) != "continue_final_message":
        return prompt + completion
    joined = {**completion[0], "content": prompt[-1]["content"] + completion[0]["content"]}
    return [*prompt[:-1], joined, *completion[1:]]


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    conversations: Sequence[tuple[Preference, Messages]],
    name: str,
    **options: Any,
) -> list[str]:
    """Render many conversations at once; one by one only to find the row that the template refuses."""
    options |= {"chat_template": template, "tokenize": False}
    try:
        return cast(list[str], tokenizer.apply_chat_template([messages for _, messages in conversations], **options))
    except Exception as failure:  # a template is a program written by others: it may raise anything
        for record, messages in conversations:
            try:
                tokenizer.apply_chat_template(messages, **options)
            except Exception as error:
                roles = ", ".join(message["role"] for message in messages)
                raise DataError(
                    f"{name}: row {record.source_row + 1}: the chat template refuses the conversation ({error}); its "
                    f"roles are {roles}. Change the roles to what the template allows, or set another template."
                ) from error
        raise DataError(f"{name}: the chat template failed on a batch of rows: {failure}") from failure
