"""Truncation, one pure function of lengths. Run once by `prepare`, so that policy, reference, training and evaluation
see the same tokens.

All completions of a row share one prompt, which is computed once, so the prompt has one cut. The cut of a completion
depends on the prompt's length, `max_length` and itself: never on a sibling. A row that fits is never cut.

- `keep_start`: the prompt is never cut; a completion keeps its first `max_length - P` tokens. A row whose prompt fills
  `max_length` is dropped. Equal to TRL 1.16.
- `keep_end`: a completion keeps its first tokens, as many as fit beside the whole prompt or beside `max_length // 2`
  tokens of it, whichever is shorter; the prompt keeps as many of its last tokens as fit beside the longest completion.
  TRL keeps the last `max_length` tokens of each sequence, which cuts one prompt differently for chosen and rejected and
  can begin a completion in its middle; neither is possible with a shared prompt.
- `middle`: lengths as with `keep_end`, but the prompt loses its middle: it keeps its beginning (instructions) and its
  end (the question), half of the room each.
- `drop`: a row that does not fit is dropped; nothing is cut.
- `error`: a row that does not fit is an error.

A completion that is cut ends without an end-of-turn token: none is put in its place. A row whose prompt would lose a
token that stands for a part of an image is dropped, since the model would have fewer places than there are features.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, TypeVar

from tether.errors import ConfigError

Item = TypeVar("Item")
TruncationMode = Literal["keep_start", "keep_end", "middle", "drop", "error"]
TRUNCATION_MODES: tuple[TruncationMode, ...] = ("keep_start", "keep_end", "middle", "drop", "error")


def truncated_lengths(
    prompt: int, completions: Sequence[int], max_length: int | None, mode: TruncationMode = "keep_start"
) -> tuple[int, list[int]] | None:
    """How many tokens a row keeps: of its prompt, see `kept_prompt`, and the first ones of each completion.

    Args:
        prompt: tokens of the prompt, P.
        completions: tokens of each completion, `[K]`.
        max_length: tokens of prompt and completion together, at least 2; None for no limit.
        mode: one of `TRUNCATION_MODES`, see the module.

    Returns:
        Tokens kept of the prompt and of each completion, or None when the row has to be dropped.

    Raises:
        ConfigError: the mode is unknown, or `max_length` leaves no room for a prompt and a completion.

    Example:
        >>> truncated_lengths(6, [2, 9], 8)
        (6, [2, 2])
        >>> truncated_lengths(6, [2, 9], 8, "keep_end")
        (4, [2, 4])
        >>> truncated_lengths(6, [2, 1], 8, "keep_end")
        (6, [2, 1])
        >>> truncated_lengths(8, [2, 9], 8) is None
        True
    """
    if mode not in TRUNCATION_MODES:
        allowed = ", ".join(f"`{one}`" for one in TRUNCATION_MODES)
        raise ConfigError(f"truncation_mode is {mode!r}; it must be one of {allowed}.")
    if max_length is None:
        return prompt, list(completions)
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; a prompt and a completion need at least 2 tokens.")
    if mode in ("drop", "error"):
        return (prompt, list(completions)) if prompt + max(completions, default=0) <= max_length else None
    # A prompt without completions is to be answered, which takes at least one token.
    room = max_length - (min(prompt, max_length // 2) if mode in ("keep_end", "middle") else prompt)
    if room <= 0:
        return None
    kept = [min(length, room) for length in completions]
    return min(prompt, max_length - max(kept, default=1)), kept


def kept_prompt(
    ids: list[Item], length: int, mode: TruncationMode, never_cut: Collection[Item] = ()
) -> list[Item] | None:
    """The tokens that are left of a prompt.

    Args:
        ids: of the prompt, or what belongs to each of its tokens.
        length: how many are kept, see `truncated_lengths`.
        mode: one of `TRUNCATION_MODES`.
        never_cut: ids of tokens that must all be kept, such as the one that stands for a part of an image.

    Returns:
        The kept ones in order, or None where a token of `never_cut` would be lost.

    Example:
        >>> kept_prompt([1, 2, 3, 4, 5], 3, "keep_end"), kept_prompt([1, 2, 3, 4, 5], 3, "middle")
        ([3, 4, 5], [1, 4, 5])
        >>> kept_prompt([9, 2, 3], 2, "keep_end", never_cut=[9]) is None
        True
    """
    if length >= len(ids):
        return ids
    front = length // 2 if mode == "middle" else 0
    lost = ids[front : len(ids) - length + front]
    if never_cut and any(token in never_cut for token in lost):
        return None
    return ids[:front] + ids[len(ids) - length + front :]
