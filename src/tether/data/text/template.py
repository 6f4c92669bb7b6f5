"""The chat template of a model, applied to many conversations at once. Called by `render`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from tether.data.rows.fields import CALL_ROLES, OTHER_ROLES
from tether.data.text.template_sandbox import EndlessTemplateError, ending_template
from tether.errors import DataError
from tether.types import Messages, Preference

_FUNCTION = {"name": "probe", "description": "A probe.", "parameters": {"type": "object", "properties": {}}}
PROBE_TOOLS: list[dict[str, Any]] = [{"type": "function", "function": _FUNCTION}]
# Mistral's templates want an id of nine letters and digits.
PROBE_CALL: dict[str, Any] = {
    "id": "probe0001",
    "type": "function",
    "function": {"name": "probe", "arguments": {"probing": "it"}},
}
# Roles that every template is meant for, though one that writes each as it is names none.
_ROLES = frozenset({"system", "user", "assistant", "tool", "developer"})
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
            f"{name}: the rows are conversations, but the tokenizer has no chat template to write them as text. Name "
            "one (in a run file `model: {chat_template: …}`, in Python `chat_template_path`): a .jinja file, or the "
            "tokenizer of an instruction-tuned model with the same tokens. `model: {tokenizer: FOLDER}` takes such a "
            "tokenizer as a whole. Or give the rows as text."
        ) from error


def template_hash(template: str) -> str:
    """A short content hash of a chat template, for reports."""
    return sha256(template.encode()).hexdigest()[:16]


def conversation(record: Preference, k: int) -> Messages:
    """Prompt and completion k as one conversation."""
    prompt, completion = cast(Messages, record.prompt), cast(Messages, record.completions[k])
    if opening(record) != "continue_final_message":
        return prompt + completion
    joined = {**completion[0], "content": prompt[-1]["content"] + completion[0]["content"]}
    return [*prompt[:-1], joined, *completion[1:]]


class Writer:
    """Writes conversations through a chat template, in as few calls as their arguments allow.

    A tokenizer with named templates writes rows that have tools with the one named `tool_use`, as transformers does.
    Arguments of tool calls, which data hold as objects or as JSON text, are given in the form that the template writes.

    Args:
        tokenizer: whose special tokens the template uses.
        template: the chat template.
        name: what to call the rows in messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> None:
        self.tokenizer, self.template, self.name = tokenizer, template, name
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        own = named.get("default") == template
        self.with_tools: str = named.get("tool_use", template) if own else template

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
            members = [(conversations[place][0], self._callable(conversations[place][1])) for place in places]
            for place, text in zip(places, self._apply(members, self._options(members[0][0], opened)), strict=True):
                texts[place] = text
        return texts

    def refuse_other_roles(self, records: Sequence[Preference]) -> None:
        """Refuse messages whose role is a usual one under another name, which the template would write as it is: a
        model has never seen it, and where the answer begins cannot be told.

        Raises:
            DataError: the template does not name that role.
        """
        named = self.template + self.with_tools
        for record in records:
            for messages in (record.prompt, *record.completions):
                for role in {message["role"] for message in cast(Messages, messages)} - _ROLES:
                    usual = OTHER_ROLES.get(role.strip().lower())
                    if (usual is not None or role in CALL_ROLES) and not _names(named, role):
                        advice = f"Rename it: `roles: {{{role}: {usual}}}` beside the `path` of the rows."
                        if role in CALL_ROLES:
                            advice = "Give the call as `tool_calls` of a message of the assistant."
                        raise DataError(
                            f"{self.name}: row {record.source_row + 1}: a message has the role `{role}`, which the "
                            f"chat template does not name and would write as it is. {advice}"
                        )

    def unread(self, record: Preference) -> set[str]:
        """Arguments of a row that the template does not know, so that they change nothing of what is written."""
        template = self._options(record, "")["chat_template"]
        names = (name for name in record.chat_template_kwargs if not re.search(rf"\b{re.escape(name)}\b", template))
        return {f"argument `{name}`" for name in names}

    def attempt(self, record: Preference, messages: Messages, opened: str = "") -> str | None:
        """The text of one conversation; None where the template refuses it."""
        try:
            return self._written(self._callable(messages), self._options(record, opened))
        except EndlessTemplateError:
            raise
        except Exception:  # a template is a program written by others: it may raise anything
            return None

    def generated(self, record: Preference, messages: Messages) -> list[tuple[int, int]] | None:
        """The parts of a conversation that the template itself marks as the assistant's; None where it marks none
        (`{% generation %}`)."""
        options = self._options(record, "")
        if not _GENERATION.search(options["chat_template"]):
            return None
        options |= {"return_assistant_tokens_mask": True}
        own = {name: value for name, value in self.tokenizer.special_tokens_map.items() if name not in options}
        with ending_template():
            _, marks = render_jinja_template([self._callable(messages)], **own, **options)
        spans = cast(list[tuple[int, int]], marks[0])
        return [(start, end) for start, end in spans if end > start]

    def _options(self, record: Preference, opened: str) -> dict[str, Any]:
        template = self.with_tools if record.tools else self.template
        tools = {"tools": record.tools} if record.tools else {}
        return {**record.chat_template_kwargs, **tools, "chat_template": template, **({opened: True} if opened else {})}

    def _written(self, messages: Any, options: dict[str, Any]) -> Any:
        with ending_template():
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _apply(self, conversations: Sequence[tuple[Preference, Messages]], options: dict[str, Any]) -> list[str]:
        """Render many conversations at once; one by one only to find the row that the template refuses."""
        try:
            return self._written([messages for _, messages in conversations], options)
        except EndlessTemplateError as endless:
            first, last = (conversations[place][0].source_row + 1 for place in (0, -1))
            raise DataError(f"{self.name}: rows {first} to {last}: {endless}") from endless
        except Exception as failure:  # a template is a program written by others: it may raise anything
            for record, messages in conversations:
                try:
                    self._written(messages, options)
                except Exception as error:
                    roles = ", ".join(message["role"] for message in messages)
                    raise DataError(
                        f"{self.name}: row {record.source_row + 1}: the chat template refuses the conversation "
                        f"({str(error) or type(error).__name__}); its roles are {roles}. Give the messages as the "
                        "template wants them, or set another template."
                    ) from error
            raise DataError(f"{self.name}: the chat template failed on a batch of rows: {failure}") from failure

    def _callable(self, messages: Messages) -> Messages:
        """Messages whose tool calls have arguments in the form that the template writes."""
        if not any(message.get("tool_calls") for message in messages):
            return messages
        form = _as_text if self._wants_text else as_object
        return [
            {**message, "tool_calls": [_with_arguments(call, form) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        ]

    @cached_property
    def _wants_text(self) -> bool:
        """Whether the template puts arguments in as they are, so that they must be JSON text (DeepSeek-V3): it refuses
        an object, or writes it as Python would."""

        def written(form: Any) -> str | None:
            call = _with_arguments(PROBE_CALL, form)
            messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
            options = {"tools": PROBE_TOOLS, "chat_template": self.with_tools}
            try:
                return self._written(messages, options)
            except EndlessTemplateError:
                raise
            except Exception:  # see above
                return None

        from_object = written(as_object)
        return (from_object is None or "{'probing'" in from_object) and written(_as_text) is not None


def _names(template: str, role: str) -> bool:
    return re.search(rf"""(['"]){re.escape(role)}\1""", template) is not None


def _with_arguments(call: Mapping[str, Any], form: Any) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], form)}
    return {**call, "arguments": form(call["arguments"])} if "arguments" in call else dict(call)


def as_object(arguments: Any) -> Any:
    """JSON text that holds an object, which is how most data write arguments, as that object."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments
    if isinstance(found, str):  # exports that encode a row as JSON do so once more with what is JSON text already
        found = as_object(found)
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    found = as_object(arguments)
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


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
