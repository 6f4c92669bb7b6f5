"""What two completions begin with together, which is their prompt where rows have none; and what messages say of
themselves. Called by `schema` and `turns`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

Sequential = TypeVar("Sequential", str, list)


def split_prompt(chosen: Sequential, rejected: Sequential) -> tuple[Sequential, Sequential, Sequential]:
    """Take what two completions begin with together as their prompt, as TRL's `extract_prompt` does.

    Messages are alike whose role, content and tool calls are: exports give each an id or a time of its own.

    In text, one space before the place where they differ goes to the completions. Where one is the beginning of the
    other, its last message (or character) stays in the completion, so that none is empty.

    Args:
        chosen: text or messages, prompt included.
        rejected: the same.

    Returns:
        The prompt and the two completions without it; an empty prompt when they share nothing.

    Example:
        >>> split_prompt("The sky is blue.", "The sky is green.")
        ('The sky is', ' blue.', ' green.')
    """
    shorter = min(len(chosen), len(rejected))
    low, high = 0, shorter
    one, other = (chosen, rejected) if isinstance(chosen, str) else (told(cast(Any, chosen)), told(cast(Any, rejected)))
    while low < high:  # slices compare in C; a loop over characters would dominate the whole preparation
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    if low == shorter:
        low = max(shorter - 1, 0)
    elif low and isinstance(chosen, str) and chosen[low - 1] == " ":
        low -= 1
    return chosen[:low], chosen[low:], rejected[low:]


def told(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Of each message, what tells it from another one."""
    return [(message.get("role"), message.get("content"), _called(message)) for message in messages]


def _called(message: Mapping[str, Any]) -> list[Any]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):  # of a row that is not checked yet
        return [calls]
    return [call.get("function", call) if isinstance(call, Mapping) else call for call in calls]


def untrained_by(message: Mapping[str, Any]) -> str:
    """The field by which a message says of itself that it is not trained on; empty where it does not.

    In the data of OpenAI it is `weight`, of LLaMA-Factory's v1 `loss_weight`, of Axolotl `train` or `training`, of
    ms-swift `loss`.

    Example:
        >>> untrained_by({"role": "assistant", "weight": 0}), untrained_by({"role": "assistant", "train": True})
        ('weight', '')
    """
    weights, flags = ("weight", "loss_weight"), ("train", "training", "loss")
    weightless = (name for name in weights if message.get(name) is not None and message[name] == 0)
    return next(weightless, next((name for name in flags if message.get(name) is False), ""))
