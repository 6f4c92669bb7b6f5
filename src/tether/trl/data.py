"""TRL's helpers for rows: conversations, prompts that both answers share, pairs taken apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from tether.data.text.template_sandbox import ending_template
from tether.errors import ConfigError

_TALK = ("prompt", "chosen", "rejected", "completion", "messages")
_ANSWERS = ("chosen", "rejected", "completion")
_NAMES = {"from": "role", "value": "content"}
Rows = Dataset | DatasetDict | IterableDataset | IterableDatasetDict


def is_conversational(example: Mapping[str, Any]) -> bool:
    """Whether a row is of messages with a role, and not of text.

    >>> is_conversational({"prompt": [{"role": "user", "content": "Hi"}]}), is_conversational({"prompt": "Hi"})
    (True, False)
    """
    given = next((example[name] for name in _TALK if name in example), None)
    first = given[0] if isinstance(given, list) and given else None
    return isinstance(first, dict) and "role" in first


def is_conversational_from_value(example: Mapping[str, Any]) -> bool:
    """Whether a row is of messages with `from` and `value`.

    >>> is_conversational_from_value({"conversations": [{"from": "human", "value": "Hi"}]})
    True
    """
    given = example.get("conversations")
    return (
        isinstance(given, list) and bool(given) and isinstance(given[0], dict) and {"from", "value"} <= given[0].keys()
    )


def maybe_convert_to_chatml(example: dict[str, Any]) -> dict[str, Any]:
    """A row whose messages have `role` and `content` in place of `from` and `value`, under `messages`.

    >>> maybe_convert_to_chatml({"conversations": [{"from": "human", "value": "Hi"}]})
    {'messages': [{'role': 'human', 'content': 'Hi'}]}
    """
    found = dict(example)
    for name in ("prompt", "completion", "chosen", "rejected", "messages", "conversations"):
        if isinstance(found.get(name), list):
            found[name] = [_in_chatml(one) if isinstance(one, dict) else one for one in found[name]]
    if "conversations" in found:
        found["messages"] = found.pop("conversations")
    return found


def _in_chatml(message: dict[str, Any]) -> dict[str, Any]:
    return {_NAMES.get(key, key): value for key, value in message.items()}


def extract_prompt(example: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt that both answers of a pair begin with, and what is left of each.

    >>> extract_prompt({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    {'prompt': 'The sky is', 'chosen': ' blue.', 'rejected': ' green.'}
    """
    chosen, rejected = example["chosen"], example["rejected"]
    place = _shared(chosen, rejected)
    # An answer that the other begins with keeps its last part; a space belongs to the word after it.
    whole = place == min(len(chosen), len(rejected))
    place -= bool(place and (whole or chosen[place - 1] == " "))
    return {"prompt": chosen[:place], "chosen": chosen[place:], "rejected": rejected[place:]}


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many parts two texts or conversations have in common from the first on."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def maybe_extract_prompt(example: dict[str, Any]) -> dict[str, Any]:
    """A pair with its prompt apart; a row that has one, of the same form as its answers, stays as it is."""
    if "chosen" not in example or "rejected" not in example:
        return example
    talks = is_conversational({"chosen": example["chosen"]})
    if "prompt" in example and talks == is_conversational({"prompt": example["prompt"]}):
        return example
    return extract_prompt(example)


def unpair_preference_dataset(dataset: Rows, **map_kwargs: Any) -> Rows:
    """Each pair as two rows: the chosen completions with the label true, then the rejected ones with false.

    Args:
        dataset: pairs.
        **map_kwargs: passed to `Dataset.map`.
    """
    rows: Any = dataset
    one = next(iter(rows.values())) if isinstance(rows, (DatasetDict, IterableDatasetDict)) else rows
    columns = one.column_names or list(next(iter(one)))
    return rows.map(_unpaired, batched=True, remove_columns=columns, **map_kwargs)


def _unpaired(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    chosen, rejected = batch["chosen"], batch["rejected"]
    others = {name: values * 2 for name, values in batch.items() if name not in ("chosen", "rejected")}
    label = [True] * len(chosen) + [False] * len(rejected)
    return {**others, "completion": chosen + rejected, "label": label}


def maybe_unpair_preference_dataset(dataset: Rows, num_proc: int | None = None, desc: str | None = None) -> Rows:
    """Pairs as two rows each; rows that are no pairs as they are."""
    rows: Any = dataset
    one = next(iter(rows.values())) if isinstance(rows, DatasetDict) else rows
    if not {"chosen", "rejected"} <= set(one.column_names or ()):
        return dataset
    streamed = isinstance(one, IterableDataset)
    return unpair_preference_dataset(dataset, **({} if streamed else {"num_proc": num_proc, "desc": desc}))


def apply_chat_template(
    example: Mapping[str, Any],
    tokenizer: Any,
    tools: list[dict[str, Any] | Callable[..., Any]] | None = None,
    **template_kwargs: Any,
) -> dict[str, Any]:
    """A row of messages as text, written by the chat template; prompt and completions are cut where they part.

    Args:
        example: the row.
        tokenizer: or processor, with a template.
        tools: that the conversation may call.
        **template_kwargs: for the template.

    Raises:
        ConfigError: the row has columns that no kind of row has together, or a prompt that ends in another role.
    """
    columns = set(example) & {*_TALK, "label"}
    known = ({"messages"}, {"prompt"}, {"prompt", "completion"}, {"prompt", "chosen", "rejected"})
    if columns not in (*known, {"chosen", "rejected"}, {"prompt", "completion", "label"}):
        raise ConfigError(
            f"apply_chat_template() got a row with {', '.join(sorted(columns)) or 'no column that it knows'}; expected "
            "messages, prompt, prompt and completion (and label), or chosen and rejected (and prompt)."
        )

    def write(messages: Sequence[Any], **how: Any) -> str:
        further = {**(example.get("chat_template_kwargs") or {}), **template_kwargs}
        with ending_template():
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **further, **how)

    label = {"label": example["label"]} if "label" in example else {}
    if "messages" in example:
        return {"text": write(example["messages"])}
    answers = [name for name in _ANSWERS if name in example]
    if "prompt" not in example:
        return {name: write(example[name]) for name in answers}
    last = example["prompt"][-1]["role"]
    if last not in ("user", "tool", "assistant"):
        raise ConfigError(f"apply_chat_template() got a prompt that ends in the role {last!r}; expected user or tool.")
    goes_on = last == "assistant"
    prompt = write(example["prompt"], add_generation_prompt=not goes_on, continue_final_message=goes_on)
    whole = {name: write([*example["prompt"], *example[name]]) for name in answers}
    # A template may open an answer differently than it writes one.
    prompt = prompt[: min((_shared(prompt, text) for text in whole.values()), default=len(prompt))]
    return {"prompt": prompt, **{name: text[len(prompt) :] for name, text in whole.items()}, **label}


def maybe_apply_chat_template(
    example: dict[str, Any],
    tokenizer: Any,
    tools: list[dict[str, Any] | Callable[..., Any]] | None = None,
    **template_kwargs: Any,
) -> dict[str, Any]:
    """A row of messages as text; a row of text as it is."""
    if not is_conversational(example):
        return example
    return apply_chat_template(example, tokenizer, tools, **template_kwargs)


def prepare_multimodal_messages(
    messages: list[dict[str, Any]], images: list[Any] | None = None
) -> list[dict[str, Any]]:
    """Messages in parts, with their images in place; of text alone, images stand before the first user's.

    Raises:
        ValueError: there are more or fewer images than places for them, or a role is unknown.
    """
    left, placed, found = list(images or ()), False, []
    for message in messages:
        role, content = message["role"], message.get("content")
        if role not in ("user", "assistant", "system", "tool"):
            raise ValueError(f"A message has the role {role!r}; expected system, user, assistant or tool.")
        if isinstance(content, str):
            first = role == "user" and not placed
            placed = placed or first
            content = [*({"type": "image"} for _ in left if first), {"type": "text", "text": content}]
            message = {**message, "content": content}
        found.append(message)
    parts = [part for message in found if message["role"] != "tool" for part in message.get("content") or ()]
    empty = [part for part in parts if part["type"] == "image" and "image" not in part]
    if len(empty) != len(left):
        raise ValueError(f"There are {len(left)} images, and {len(empty)} places for them in the messages.")
    return [
        message
        if message["role"] == "tool" or not message.get("content")
        else {**message, "content": [_filled(part, left) for part in message["content"]]}
        for message in found
    ]


def _filled(part: dict[str, Any], images: list[Any]) -> dict[str, Any]:
    return {**part, "image": images.pop(0)} if part["type"] == "image" and "image" not in part else part
