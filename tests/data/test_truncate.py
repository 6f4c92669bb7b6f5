"""INV-32: truncation is one pure function of a row, and the cut of one completion never depends on its sibling."""

from __future__ import annotations

import itertools

import pytest

from tether.data import truncated_lengths
from tether.data.text.truncate import TRUNCATION_MODES, TruncationMode, kept_prompt
from tether.errors import ConfigError

PROMPT = [1, 2, 3, 4]
LONG, SHORT = [11, 12, 13, 14, 15], [21]
Cut = tuple[list[int], list[list[int]]] | None


def cut(limit: int | None, mode: TruncationMode = "keep_start", prompt: list[int] = PROMPT, never: tuple = ()) -> Cut:
    """The prompt with a long and a short completion, as they are left."""
    lengths = truncated_lengths(len(prompt), [len(LONG), len(SHORT)], limit, mode)
    kept = lengths and kept_prompt(prompt, lengths[0], mode, never)
    return None if not lengths or kept is None else (kept, [LONG[: lengths[1][0]], SHORT[: lengths[1][1]]])


def test_keep_start_keeps_the_prompt_and_the_beginning_of_each_completion() -> None:
    assert cut(6) == (PROMPT, [[11, 12], [21]])


def test_keep_end_cuts_a_long_completion_at_its_end_and_the_prompt_at_its_start() -> None:
    assert cut(6, "keep_end") == ([2, 3, 4], [[11, 12, 13], [21]])


def test_middle_keeps_the_beginning_and_the_end_of_the_prompt() -> None:
    assert cut(6, "middle") == ([1, 3, 4], [[11, 12, 13], [21]])
    assert truncated_lengths(10, [2], 6, "middle") == (4, [2])
    assert kept_prompt(list(range(10)), 4, "middle") == [0, 1, 8, 9]


def test_drop_cuts_nothing() -> None:
    assert cut(8, "drop") is None
    assert cut(9, "drop") == (PROMPT, [LONG, SHORT])


@pytest.mark.parametrize("mode", ["keep_end", "middle"])
def test_a_row_whose_image_would_be_cut_is_dropped(mode: TruncationMode) -> None:
    prompt = [7, 7, 3, 4] if mode == "keep_end" else [1, 7, 7, 4]
    assert cut(6, mode, prompt, never=(7,)) is None
    assert cut(6, mode, prompt, never=(8,)) is not None
    assert cut(9, mode, prompt, never=(7,)) == (prompt, [LONG, SHORT])


@pytest.mark.parametrize("mode", TRUNCATION_MODES)
def test_no_limit_and_short_rows_change_nothing(mode: TruncationMode) -> None:
    assert cut(None, mode) == cut(9, mode) == (PROMPT, [LONG, SHORT])


def test_a_completion_keeps_at_least_one_token_or_the_row_is_dropped() -> None:
    assert cut(5) == (PROMPT, [[11], [21]])
    assert cut(4) is None
    assert cut(2, "middle") == cut(2, "keep_end") == ([4], [[11], [21]])


@pytest.mark.parametrize("mode", [mode for mode in TRUNCATION_MODES if mode not in ("drop", "error")])
def test_a_cut_does_not_depend_on_the_sibling(mode: str) -> None:
    """INV-32, over all small lengths: with any sibling a completion is cut as it is alone, and what fits is not cut."""
    for prompt, length, sibling, limit in itertools.product(range(1, 8), range(1, 8), range(1, 8), range(2, 12)):
        alone = truncated_lengths(prompt, [length], limit, mode)  # type: ignore[arg-type]
        both = truncated_lengths(prompt, [length, sibling], limit, mode)  # type: ignore[arg-type]
        assert (alone is None) == (both is None)
        if alone and both:
            assert both[1][0] == alone[1][0]
            if prompt + max(length, sibling) <= limit:
                assert both == (prompt, [length, sibling])
            assert both[0] >= 1
            assert all(1 <= kept <= limit - both[0] for kept in both[1])


def test_wrong_options_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="truncation_mode is 'ends'; it must be one of `keep_start`, `keep_end`, `middle`, `drop`"
    ):
        truncated_lengths(1, [1], 5, "ends")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_length is 1; a prompt and a completion need at least 2 tokens"):
        truncated_lengths(1, [1], 1)
