"""Ready-made rewards, by the names that a run file knows: answers, formats, lengths, repetition."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from tether.data.sources.functions import local_function
from tether.errors import ConfigError
from tether.rewards.protocol import RewardFunction

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_THOUGHT = re.compile(r"^\s*<think>(?!.*<think>)(.*?)</think>.*\S", re.DOTALL)


def text_of(completion: Any) -> str:
    """The text of a completion that is text or messages.

    >>> text_of([{"role": "assistant", "content": "4"}])
    '4'
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def last_number(text: str) -> float | None:
    """The last number in a text; None where there is none.

    >>> last_number("2 and 2 make 1,004.50."), last_number("none")
    (1004.5, None)
    """
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def numeric_answer(column: str = "answer") -> RewardFunction:
    """1 where the last number of a completion is the last number of a column, else 0; None where the column has none.

    >>> numeric_answer()(completions=["It is 4.", "5"], answer=["#### 4", 4])
    [1.0, 0.0]
    """

    def reward(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
        right = [None if value is None else last_number(str(value)) for value in columns[column]]
        said = [last_number(text_of(one)) for one in completions]
        return [
            None if r is None else float(s is not None and abs(s - r) < 1e-6) for s, r in zip(said, right, strict=True)
        ]

    return _named(reward, "numeric_answer", column)


def exact_answer(column: str = "answer") -> RewardFunction:
    """1 where a completion is a column's text, whatever the case and the space around it; None where it is empty.

    >>> exact_answer("gold")(completions=[" Paris", "Rome"], gold=["paris", "Paris"])
    [1.0, 0.0]
    """

    def reward(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
        pairs = zip(completions, columns[column], strict=True)
        return [None if r is None else float(_plain(text_of(one)) == _plain(str(r))) for one, r in pairs]

    return _named(reward, "exact_answer", column)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def regex(pattern: str) -> RewardFunction:
    """1 where a pattern is found in a completion, else 0.

    >>> regex("^[0-9]+$")(completions=["12", "a12"])
    [1.0, 0.0]

    Raises:
        ConfigError: no regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"The reward 'regex' has the pattern {pattern!r}, which is not one: {error}.") from error

    def reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(compiled.search(text_of(one)) is not None) for one in completions]

    return _named(reward, "regex")


def think_format() -> RewardFunction:
    """1 where a completion is one thought in `<think>` tags and an answer after it; the prompt may have opened the tag.

    >>> think_format()(prompts=["Q", "Q<think>"], completions=["<think>a</think> b", "a</think> b"])
    [1.0, 1.0]
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        found = []
        for prompt, one in zip(prompts, completions, strict=True):
            opened = isinstance(prompt, str) and prompt.rstrip().endswith("<think>")
            text = text_of(one)
            # A chat template may have opened it behind the messages: then the text begins inside the thought.
            opened = opened or ("</think>" in text and "<think>" not in text)
            found.append(float(_THOUGHT.match(f"<think>{text}" if opened else text) is not None))
        return found

    return _named(reward, "think_format")


def length(target: int) -> RewardFunction:
    """1 at a number of tokens, less by the share that a completion is shorter or longer, at least 0.

    >>> length(4)(completion_ids=[[1] * 4, [1] * 3, [1] * 9])
    [1.0, 0.75, 0.0]
    """
    _from_one("length", "target", target)

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [max(0.0, 1 - abs(len(ids) - target) / target) for ids in completion_ids]

    return _named(reward, "length")


def soft_overlong(max_length: int, margin: int) -> RewardFunction:
    """0 up to `max_length - margin` tokens, then falling to -1 at `max_length` (Yu et al., DAPO, eq. 13).

    >>> soft_overlong(10, 4)(completion_ids=[[1] * 6, [1] * 8, [1] * 12])
    [0.0, -0.5, -1.0]
    """
    _from_one("soft_overlong", "margin", margin)

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        free = max_length - margin
        return [0.0 - min(1.0, max(0.0, (len(ids) - free) / margin)) for ids in completion_ids]

    return _named(reward, "soft_overlong")


def repetition(n: int = 3) -> RewardFunction:
    """0 where no run of n tokens comes twice, falling to -1 with the share that does.

    >>> repetition(2)(completion_ids=[[1, 2, 3], [1, 1, 1, 1], [1]])
    [0.0, -0.666..., 0.0]
    """
    _from_one("repetition", "n", n)

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        found = []
        for ids in completion_ids:
            runs = [tuple(ids[place : place + n]) for place in range(len(ids) - n + 1)]
            found.append(len(set(runs)) / len(runs) - 1 if runs else 0.0)
        return found

    return _named(reward, "repetition")


READY_MADE: dict[str, Callable[..., RewardFunction]] = {
    one.__name__: one for one in (numeric_answer, exact_answer, regex, think_format, length, soft_overlong, repetition)
}


def python_function(place: str, what: str = "a reward function") -> RewardFunction:
    """A function in a local file, such as `rewards.py:brevity`; the file is run as the user.

    Raises:
        ConfigError: no such file or function.
    """
    return local_function(place, what)


def _named(reward: Any, name: str, *columns: str) -> RewardFunction:
    """The function with its name in metrics, and the columns that it needs."""
    reward.__name__, reward.columns = name, columns
    return reward


def _from_one(reward: str, option: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"The reward {reward!r} has {option} {value!r}; it must be a whole number from 1.")
