"""INV-32: truncation is one pure function of a row, and the cut of one completion never depends on its sibling."""

from __future__ import annotations

import itertools

import pytest

from tether.data import truncate, truncated_lengths
from tether.data.text.truncate import TRUNCATION_MODES
from tether.errors import ConfigError
from tether.types import Example

PROMPT = [1, 2, 3, 4]
EXAMPLE = Example.of(PROMPT, [[11, 12, 13, 14, 15], [21]], source_row=7)


def lists(example: Example | None) -> tuple[list[int], list[list[int]]]:
    assert example is not None
    return example.prompt_ids.tolist(), [ids.tolist() for ids in example.completion_ids]


def test_keep_start_keeps_the_prompt_and_the_beginning_of_each_completion() -> None:
    assert lists(truncate(EXAMPLE, 6)) == (PROMPT, [[11, 12], [21]])


def test_keep_end_cuts_a_long_completion_at_its_end_and_the_prompt_at_its_start() -> None:
    assert lists(truncate(EXAMPLE, 6, "keep_end")) == ([2, 3, 4], [[11, 12, 13], [21]])


def test_middle_keeps_the_beginning_and_the_end_of_the_prompt() -> None:
    assert lists(truncate(EXAMPLE, 6, "middle")) == ([1, 3, 4], [[11, 12, 13], [21]])
    long = Example.of(list(range(10)), [[11, 12]])
    assert lists(truncate(long, 6, "middle")) == ([0, 1, 8, 9], [[11, 12]])


def test_drop_cuts_nothing() -> None:
    assert truncate(EXAMPLE, 8, "drop") is None
    assert lists(truncate(EXAMPLE, 9, "drop")) == lists(EXAMPLE)


@pytest.mark.parametrize("mode", ["keep_end", "middle"])
def test_a_row_whose_image_would_be_cut_is_dropped(mode: str) -> None:
    prompt = [7, 7, 3, 4] if mode == "keep_end" else [1, 7, 7, 4]
    with_image = Example.of(prompt, [[11, 12, 13, 14, 15]])
    assert truncate(with_image, 6, mode, never_cut=[7]) is None  # type: ignore[arg-type]
    assert truncate(with_image, 6, mode, never_cut=[8]) is not None  # type: ignore[arg-type]
    assert truncate(with_image, 9, mode, never_cut=[7]) is not None  # type: ignore[arg-type]


def test_no_limit_and_short_rows_change_nothing() -> None:
    for mode in TRUNCATION_MODES:
        assert lists(truncate(EXAMPLE, None, mode)) == lists(EXAMPLE)
        assert lists(truncate(EXAMPLE, 9, mode)) == lists(EXAMPLE)


def test_a_completion_keeps_at_least_one_token_or_the_row_is_dropped() -> None:
    assert lists(truncate(EXAMPLE, 5)) == (PROMPT, [[11], [21]])
    assert truncate(EXAMPLE, 4) is None
    assert lists(truncate(EXAMPLE, 2, "middle")) == ([4], [[11], [21]])
    assert lists(truncate(EXAMPLE, 2, "keep_end")) == ([4], [[11], [21]])


@pytest.mark.parametrize("mode", [mode for mode in TRUNCATION_MODES if mode != "drop"])
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


def test_the_example_is_not_changed_and_keeps_its_row() -> None:
    cut = truncate(EXAMPLE, 5)
    assert cut is not None
    assert cut.source_row == 7
    assert lists(EXAMPLE) == (PROMPT, [[11, 12, 13, 14, 15], [21]])


def test_wrong_options_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="truncation_mode is 'ends'; it must be one of `keep_start`, `keep_end`, `middle`, `drop`"
    ):
        truncate(EXAMPLE, 5, "ends")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_length is 1; a prompt and a completion need at least 2 tokens"):
        truncate(EXAMPLE, 1)
