"""Formats of preference data by their names: each turns a row into TRL's columns. Called by `sources`.

A format says where the prompt is; what the answers are follows from the kind that is wanted. The names of Axolotl's
dataset types are kept. Axolotl writes the template of the name into the text; here rows become messages, which the
model's own chat template writes, so that no model is trained on the markers of another: `chatml.intel` and
`llama3.intel` are one format. Prompts and answers are otherwise as there.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tether.data.rows.columns import IMAGE_COLUMNS
from tether.data.rows.fields import (
    FieldFault,
    answer,
    conversation,
    first_of,
    is_transcript,
    label,
    optional,
    text,
    transcript,
)
from tether.data.rows.values import described
from tether.errors import ConfigError
from tether.types import Kind, Messages

Row = Mapping[str, Any]
_PROMPT_NAMES = ("prompt", "input", "question", "instruction")
# Columns of a row that mean the same in every format.
LABELS = frozenset({"label", "kto_tag"})
KEPT = ("weight", "margin", "chat_template_kwargs", "tools", *IMAGE_COLUMNS)


@dataclass(frozen=True)
class Format:
    """How rows of one layout become rows with TRL's columns.

    Args:
        name: as it is written in a run file.
        about: where such rows come from, in a few words.
        fields: columns that it reads, for messages.
        prompt: the prompt of a row, as messages or text.
        answers: kind to the columns that this kind has besides the prompt. Kinds that are not in it are refused.
    """

    name: str
    about: str
    fields: tuple[str, ...]
    prompt: Callable[[Row], Messages | str]
    answers: Mapping[Kind, Callable[[Row], dict[str, Any]]]


@dataclass(frozen=True)
class Wording:
    """Patterns of `user_defined`: text with `{prompt}`, `{system}`, `{chosen}` and so on in its places.

    Args:
        patterns: of `prompt`, `chosen`, `rejected` and `completion`; those that are left out are the field alone.
    """

    patterns: Mapping[str, str] = field(default_factory=dict)

    def fill(self, name: str, row: Row) -> str:
        """The text of one part of a row."""
        pattern = self.patterns.get(name) or "{" + name + "}"
        parts = []
        for literal, place, *_ in string.Formatter().parse(pattern):
            parts.append(literal)
            if place is not None:
                parts.append((optional(row, place) or "") if place == "system" else text(row, place))
        return "".join(parts)

    def check(self) -> None:
        """Refuse patterns that cannot be filled in.

        Raises:
            ConfigError: a place has no plain name, or the braces do not close.
        """
        for name, pattern in self.patterns.items():
            try:
                places = [place for _, place, *_ in string.Formatter().parse(pattern) if place is not None]
            except ValueError as error:
                raise ConfigError(f"{name}_format is {pattern!r}, which cannot be read: {error}.") from error
            if odd := [place for place in places if not place.isidentifier()]:
                raise ConfigError(f"{name}_format has the place {{{odd[0]}}}; a place must be the name of a field.")


def _with_system(row: Row, messages: Messages) -> Messages:
    system = optional(row, "system")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _asked(names: tuple[str, ...]) -> Callable[[Row], Messages]:
    """A prompt of one question, with a system message where the row has one."""

    def prompt(row: Row) -> Messages:
        return _with_system(row, [{"role": "user", "content": text(row, first_of(row, names))}])

    return prompt


def _before_the_answer(row: Row) -> Messages:
    """A prompt that is a whole conversation but for its last message."""
    return conversation(row, first_of(row, ("chosen", "completion")), 2)[:-1]


def _pair(row: Row) -> dict[str, Any]:
    chosen, rejected = (first_of(row, (name, f"{name}_response")) for name in ("chosen", "rejected"))
    return {"chosen": answer(row, chosen), "rejected": answer(row, rejected)}


def _labelled(row: Row) -> dict[str, Any]:
    return {"completion": answer(row, "completion"), **label(row)}


_ANSWERS: dict[Kind, Callable[[Row], dict[str, Any]]] = {
    "pair": _pair,
    "unpaired": _labelled,
    "prompt_only": lambda row: {},
}


def _alpaca_prompt(row: Row) -> Messages:
    asked = [part for part in (text(row, "instruction"), optional(row, "input")) if part]
    history = row.get("history") or []
    if not isinstance(history, list):
        raise FieldFault(f"`history` is {described(history)}; it must be a list of pairs of texts")
    messages: Messages = []
    for place, turn in enumerate(history, 1):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(part, str) for part in turn):
            raise FieldFault(f"turn {place} of `history` is {described(turn)}; it must be a question and an answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return _with_system(row, [*messages, {"role": "user", "content": "\n".join(asked)}])


def _alpaca_text(row: Row) -> str:
    """Stanford Alpaca's wording."""
    asked, more = text(row, "instruction"), optional(row, "input")
    task = "Below is an instruction that describes a task"
    task += ", paired with an input that provides further context. " if more else ". "
    task += "Write a response that appropriately completes the request.\n\n"
    given = f"### Input:\n{more}\n\n" if more else ""
    return f"{task}### Instruction:\n{asked}\n\n{given}### Response:\n"


def _sharegpt(row: Row) -> Messages:
    return _with_system(row, conversation(row, first_of(row, ("conversations", "messages"))))


def _sharegpt_prompt(row: Row) -> Messages:
    whole = _sharegpt(row)
    return whole[:-1] if whole[-1]["role"] == "assistant" else whole


def _last(messages: Messages) -> Messages:
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise FieldFault(f"the last of the {len(messages)} messages is from the {messages[-1]['role']}; it must answer")
    return messages[-1:]


def _from_first_answer(row: Row, whole: Messages) -> dict[str, Any]:
    """Supervised rows: a completion begins with the first answer; `turns` says which of its turns are scored.

    Images stand in prompts alone, so that with them the completion is the last answer.
    """
    _last(whole)
    first = len(whole) - 1
    if not any(row.get(column) for column in IMAGE_COLUMNS):
        asked = [place for place, message in enumerate(whole) if message["role"] == "user"]
        answers = (place for place in range(asked[0] if asked else first, first) if whole[place]["role"] == "assistant")
        first = next(answers, first)
    return {"prompt": whole[:first], "completion": whole[first:]}


def _openrlhf_prompt(row: Row) -> Messages | str:
    name = first_of(row, ("prompt", "input"))
    if row.get(name) is None:
        return _before_the_answer(row)
    if isinstance(row[name], str):
        return row[name]
    whole = conversation(row, name)
    given = {key for key, value in row.items() if value is not None}
    return whole if given & {"chosen", "output", "completion"} else whole[:-1]


def _openrlhf_answer(row: Row, name: str) -> Any:
    """Text beside a prompt of text, messages beside messages."""
    prompt = row.get(first_of(row, ("prompt", "input")))
    return text(row, name) if isinstance(prompt, str) else answer(row, name)


def _openrlhf_output(row: Row) -> dict[str, Any]:
    name = first_of(row, ("output", "completion"))
    whole = row.get(name) is None and isinstance(row.get("input"), list)
    return {"completion": _last(conversation(row, "input", 2)) if whole else _openrlhf_answer(row, name)}


def _hh_pair(row: Row) -> dict[str, Any]:
    history, chosen, rejected = _hh_prompt(row), transcript(row, "chosen"), transcript(row, "rejected")
    if rejected[: len(history)] != history:
        raise FieldFault("`rejected` does not begin with the turns of `chosen` up to its last; there is no one prompt")
    return {"chosen": chosen[len(history) :], "rejected": rejected[len(history) :]}


def _hh_prompt(row: Row) -> Messages:
    whole = transcript(row, "chosen")
    _last(whole)
    return whole[:-1]


def _ranked_answers(row: Row) -> list[str]:
    """Nectar's answers, the best (rank 1) first."""
    answers = row.get("answers")
    if not isinstance(answers, list) or len(answers) < 2:
        raise FieldFault(f"`answers` is {described(answers)}; it must be a list of at least two")
    for place, item in enumerate(answers, 1):
        rank = item.get("rank") if isinstance(item, dict) else None
        if not isinstance(rank, (int, float)) or isinstance(rank, bool) or not isinstance(item.get("answer"), str):
            raise FieldFault(f"item {place} of `answers` is {described(item)}; it must have `answer` and `rank`")
    return [item["answer"] for item in sorted(answers, key=lambda item: item["rank"])]


def _nectar_prompt(row: Row) -> Messages:
    given = text(row, "prompt")
    if not is_transcript(given):
        return [{"role": "user", "content": given}]
    turns = transcript(row, "prompt")
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _nectar_pair(row: Row) -> dict[str, Any]:
    best, second, *_ = _ranked_answers(row)
    first, other, *_ = sorted(item["rank"] for item in row["answers"])
    if first == other:
        raise FieldFault(f"two answers have the best rank, {first}, so that neither is preferred")
    return {"chosen": _said(best), "rejected": _said(second)}


def _said(content: str) -> Messages:
    return [{"role": "assistant", "content": content}]


def _rejected_beside(row: Row) -> dict[str, Any]:
    name = first_of(row, ("rejected", "rejected_response", "rejected_messages"))
    return {"chosen": _last(conversation(row, "messages", 2)), "rejected": answer(row, name)}


def _history(row: Row) -> Messages:
    if isinstance(row.get("messages"), str):
        return [{"role": "user", "content": row["messages"]}]
    return conversation(row, "messages")


def _families() -> list[Format]:
    """Axolotl's types that are named after a template."""
    found: list[Format] = []
    questions = {
        "intel": (("question",), "Intel's Orca pairs"),
        "icr": (("input",), "system, input, chosen, rejected"),
        "prompt_pairs": (("prompt",), "a prompt and answers"),
        "ultra": (("prompt",), "UltraFeedback: a prompt and conversations that end in the answer"),
        "argilla": (_PROMPT_NAMES, "Argilla's: prompt, input, question or instruction"),
        "default": (_PROMPT_NAMES, "the same"),
    }
    for family in ("chatml", "llama3", "mistral"):
        for name, (fields, about) in questions.items():
            found.append(Format(f"{family}.{name}", about, fields, _asked(fields), _ANSWERS))
        about = "Argilla's conversations: chosen and rejected hold the question too"
        found.append(Format(f"{family}.argilla_chat", about, ("chosen", "rejected"), _before_the_answer, _ANSWERS))
    return found


_OTHERS = (
    Format("chat_template.default", "messages, and an answer of each side", ("messages",), _history, _ANSWERS),
    Format("chat_template.argilla_chat", "see chatml.argilla_chat", ("chosen",), _before_the_answer, _ANSWERS),
    Format("chat_template.argilla", "Axolotl's ORPO type", ("prompt",), _asked(("prompt",)), _ANSWERS),
    Format(
        "zephyr.nectar",
        "Nectar: the answers of ranks 1 and 2, or all of them as a ranked list",
        ("prompt", "answers"),
        _nectar_prompt,
        {
            "pair": _nectar_pair,
            "ranked": lambda row: {"completions": [_said(one) for one in _ranked_answers(row)]},
            "prompt_only": lambda row: {},
        },
    ),
    Format(
        "alpaca",
        "LLaMA-Factory: instruction, input, system, history",
        ("instruction",),
        _alpaca_prompt,
        {
            **_ANSWERS,
            "unpaired": lambda row: {"completion": answer(row, "output"), **label(row, "kto_tag")},
            "completion": lambda row: _from_first_answer(row, [*_alpaca_prompt(row), *answer(row, "output")]),
        },
    ),
    Format(
        "alpaca_text",
        "instruction, input and output in Stanford Alpaca's wording, as Axolotl's type alpaca",
        ("instruction",),
        _alpaca_text,
        {"completion": lambda row: {"completion": text(row, "output")}, "prompt_only": lambda row: {}},
    ),
    Format(
        "sharegpt",
        "LLaMA-Factory: conversations of {from, value}",
        ("conversations",),
        _sharegpt_prompt,
        {
            **_ANSWERS,
            "unpaired": lambda row: {"completion": _last(_sharegpt(row)), **label(row, "kto_tag")},
            "completion": lambda row: _from_first_answer(row, _sharegpt(row)),
        },
    ),
    Format(
        "openrlhf",
        "OpenRLHF: prompt or input; chosen and rejected, or output",
        ("prompt", "input"),
        _openrlhf_prompt,
        {
            "pair": lambda row: {name: _openrlhf_answer(row, name) for name in ("chosen", "rejected")},
            "unpaired": lambda row: {**_openrlhf_output(row), **label(row)},
            "completion": _openrlhf_output,
            "prompt_only": lambda row: {},
        },
    ),
    Format(
        "hh",
        "HH-RLHF: transcripts of Human and Assistant",
        ("chosen", "rejected"),
        _hh_prompt,
        {"pair": _hh_pair, "prompt_only": lambda row: {}},
    ),
    Format(
        "messages_rejected",
        "messages that end in the chosen answer, and the rejected one beside them",
        ("messages", "rejected"),
        lambda row: conversation(row, "messages", 2)[:-1],
        {"pair": _rejected_beside, "prompt_only": lambda row: {}},
    ),
)
FORMATS: dict[str, Format] = {one.name: one for one in (*_families(), *_OTHERS)}
# Names that stand for the columns as they are, and for text patterns; Axolotl writes both with and without `.default`.
PLAIN = ("passthrough", "passthrough.default")
PATTERNED = ("user_defined", "user_defined.default")
FORMAT_NAMES = (*PLAIN, *PATTERNED, *sorted(FORMATS))


def patterned(wording: Wording) -> Format:
    """The format of `user_defined`: text, put together from patterns."""
    wording.check()
    return Format(
        "user_defined",
        "text from patterns",
        ("prompt",),
        lambda row: wording.fill("prompt", row),
        {
            "pair": lambda row: {name: wording.fill(name, row) for name in ("chosen", "rejected")},
            "unpaired": lambda row: {"completion": wording.fill("completion", row), **label(row)},
            "completion": lambda row: {"completion": wording.fill("completion", row)},
            "prompt_only": lambda row: {},
        },
    )
