"""Numbers of rows, completions and tokens travel with an example through packing, splitting and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tether.errors import ScoringError
from tether.scoring import pack
from tether.scoring.batch import with_prompts, with_token_values
from tether.training.budget import TokenBudget
from tether.types import Example


def example(number: int, lengths: tuple[int, ...]) -> Example:
    """Values that say whose they are: `number`, the completion's place, the token's place."""
    made = Example.of([1, 5, number + 10], [[20 + k] * length for k, length in enumerate(lengths)], number)
    return replace(
        made,
        values={"weight": float(number)},
        completion_values={"advantage": torch.tensor([number + k / 10 for k in range(len(lengths))])},
        token_values={"rollout": tuple(number + k / 10 + torch.arange(n) / 100 for k, n in enumerate(lengths))},
    )


EXAMPLES = [example(0, (2, 1)), example(1, (3,)), example(2, (1, 2, 1))]


def test_each_level_is_joined_in_the_order_of_the_batch():
    batch = pack(EXAMPLES)
    assert batch.values["weight"].tolist() == [0.0, 1.0, 2.0]
    torch.testing.assert_close(batch.completion_values["advantage"], torch.tensor([0, 0.1, 1, 2, 2.1, 2.2]))
    expected = [0, 0.01, 0.1, 1, 1.01, 1.02, 2, 2.1, 2.11, 2.2]
    torch.testing.assert_close(batch.token_values["rollout"], torch.tensor(expected))
    assert len(batch.token_values["rollout"]) == len(batch.targets)


def test_tokens_that_are_not_scored_have_no_value_in_the_batch():
    masked = replace(EXAMPLES[1], scored=(torch.tensor([True, False, True]),))
    torch.testing.assert_close(pack([masked]).token_values["rollout"], torch.tensor([1.0, 1.02]))


def test_a_split_batch_holds_the_values_of_the_whole_one():
    parts = TokenBudget(8).split(pack(EXAMPLES))
    assert len(parts) > 1
    for part in parts:
        for one in part.batch.examples:
            place = part.batch.examples.index(one)
            first = sum(part.batch.sizes[:place])
            found = part.batch.completion_values["advantage"][first : first + len(one.completion_ids)]
            torch.testing.assert_close(found, EXAMPLES[one.source_row].completion_values["advantage"])


def test_values_of_tokens_come_back_to_their_examples():
    masked = [EXAMPLES[0], replace(EXAMPLES[1], scored=(torch.tensor([False, True, True]),)), EXAMPLES[2]]
    batch = pack(masked)
    scores = torch.arange(len(batch.targets)).float()
    back = with_token_values(batch, {"policy": scores})
    torch.testing.assert_close(pack(back).token_values["policy"], scores)
    torch.testing.assert_close(pack(back).token_values["rollout"], batch.token_values["rollout"])
    assert back[1].token_values["policy"][0].tolist() == [0.0, 3.0, 4.0]


def test_rows_with_other_names_are_refused_at_each_level():
    for level in ("values", "completion_values", "token_values"):
        with pytest.raises(ScoringError, match=f"Row 1 has the {level}"):
            pack([EXAMPLES[0], replace(EXAMPLES[1], **{level: {}})])


def test_prompts_have_no_values_of_completions():
    with pytest.raises(ScoringError, match="Prompts are scored"):
        with_prompts(pack(EXAMPLES))
