"""TRL's reward functions, by its names: accuracy of mathematics, format, length, repetition."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tether.errors import ConfigError
from tether.rewards import READY_MADE
from tether.rewards.builtin import text_of

__all__ = [
    "accuracy_reward",
    "get_cosine_scaled_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "reasoning_accuracy_reward",
    "think_format_reward",
]
_THOUGHT_ENDS = ("</think>",)


def accuracy_reward(completions: Sequence[Any], solution: Sequence[str], **_: Any) -> list[float | None]:
    r"""1 where the formula that a completion gives is worth what the solution is, else 0; None where that is none.

    Raises:
        ConfigError: math-verify is not installed.
    """
    return [_correct(text_of(one), right) for one, right in zip(completions, solution, strict=True)]


def reasoning_accuracy_reward(
    completions: Sequence[Any], solution: Sequence[str], reasoning_delimiters: Sequence[str] | None = None, **_: Any
) -> list[float | None]:
    """`accuracy_reward` of what follows the thoughts; 0 where they do not end.

    Args:
        completions: text or messages.
        solution: right answers.
        reasoning_delimiters: what ends thoughts; the first that a completion has counts.

    Raises:
        ConfigError: math-verify is not installed.
    """
    found: list[float | None] = []
    for one, right in zip(completions, solution, strict=True):
        text = text_of(one)
        end = next((mark for mark in reasoning_delimiters or _THOUGHT_ENDS if mark in text), None)
        found.append(0.0 if end is None else _correct(text.rpartition(end)[2], right))
    return found


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., list[float | None]]:
    """Accuracy, scaled along a cosine of the length: short right answers are worth most, short wrong ones least."""

    def cosine_scaled_reward(
        completions: Sequence[Any], solution: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float | None]:
        found: list[float | None] = []
        for right, ids in zip(accuracy_reward(completions, solution), completion_ids, strict=True):
            if right is None:
                found.append(None)
                continue
            short, long = (max_value_correct, min_value_correct) if right else (min_value_wrong, max_value_wrong)
            share = (1 + math.cos(math.pi * min(len(ids) / max_len, 1.0))) / 2
            found.append(long + (short - long) * share)
        return found

    return cosine_scaled_reward


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """0 where no run of tokens comes twice, falling to `max_penalty` with the share that does.

    Raises:
        ConfigError: the penalty is positive.
    """
    if max_penalty > 0:
        raise ConfigError(f"max_penalty is {max_penalty}; expected a number of at most 0.")
    shares = READY_MADE["repetition"](ngram_size)

    def repetition_penalty_reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [0.0 - share * max_penalty for share in shares(completion_ids=completion_ids)]

    return repetition_penalty_reward


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """0 up to `max_completion_len - soft_punish_cache` tokens, then falling to -1 (DAPO, eq. 13)."""
    made = READY_MADE["soft_overlong"](max_completion_len, soft_punish_cache)

    def soft_overlong_punishment_reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return made(completion_ids=completion_ids)

    return soft_overlong_punishment_reward


def think_format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where a completion is one thought in `<think>` tags and what follows, else 0."""
    found = []
    for one in completions:
        text = text_of(one)
        inside = text.removeprefix("<think>")
        found.append(float(text != inside and "<think>" not in inside and "</think>" in inside))
    return found


def _correct(text: str, solution: str) -> float | None:
    try:
        from latex2sympy2_extended import NormalizationConfig  # type: ignore[import-not-found]
        from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            "This reward compares formulae by math-verify. Install it: pip install math-verify."
        ) from error
    # Its time limits are signals, which the main thread alone gets.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    right = parse(solution, parsing_timeout=seconds)
    if not right:
        return None
    units = NormalizationConfig(units=True)
    how = LatexExtractionConfig(boxed_match_priority=0, normalization_config=units, try_extract_without_anchor=False)
    said = parse(text, extraction_config=[how], extraction_mode="first_match", parsing_timeout=seconds)
    return float(verify(right, said, timeout_seconds=seconds))
