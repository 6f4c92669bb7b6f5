"""The annotations of records, scoring and objectives are checked at each call of the tests: wrong shapes are caught."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from tether.objectives import OBJECTIVES
from tether.scoring import pack
from tether.scoring.head import Head, token_scores
from tether.types import Example, Scores

NUMBERS = torch.zeros(3)
INDEX = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scores(NUMBERS, INDEX[:2], 1),
        lambda: Scores(NUMBERS, NUMBERS, 1),
        lambda: Scores(NUMBERS[None], INDEX, 1),
        lambda: Scores(NUMBERS, INDEX, 1, top1=NUMBERS),
        lambda: OBJECTIVES["dpo"]["sigmoid"](NUMBERS, NUMBERS[:, None]),
        lambda: OBJECTIVES["kto"]["kto"](NUMBERS, NUMBERS, 0.0),
        lambda: token_scores(Head(torch.nn.Linear(4, 5)), torch.zeros(3, 4), INDEX[:2]),
        lambda: pack([Example(torch.zeros(2), (INDEX,))]),
    ],
)
def test_a_wrong_shape_is_caught(make):
    with pytest.raises(TypeCheckError):
        make()


def test_right_shapes_pass():
    assert Scores(NUMBERS, INDEX, 1).logps.shape == (1,)
    assert OBJECTIVES["dpo"]["sigmoid"](NUMBERS, NUMBERS).shape == (3,)
    assert OBJECTIVES["kto"]["kto"](NUMBERS, NUMBERS > 0, 0.0).shape == (3,)
    assert len(token_scores(Head(torch.nn.Linear(4, 5)), torch.zeros(3, 4), INDEX).token_logps) == 3
