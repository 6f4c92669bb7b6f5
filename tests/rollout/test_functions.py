"""A user's `rollout_func`: what it may return, and what is refused with the field and the value (R24)."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from tether.errors import RolloutError
from tether.rollout import RolloutRequest, Sampling
from tether.rollout.records import as_ids
from tether.training.online.function import FunctionEngine
from tiny import VOCABULARY, tiny_model

MODEL = tiny_model()
REQUESTS = [RolloutRequest(as_ids([5, 6, 7]), row, range(2), row={"prompt": "p"}) for row in range(2)]
PLAIN = {
    "prompt_ids": [[5, 6, 7]] * 4,
    "completion_ids": [[20, 30, 2], [21, 2], [22, 31], [23, 2]],
    "logprobs": [[-1.0, None, -2.0], [-1.0, math.nan], None, [-0.5, 0.0]],
}


def groups(answer):
    engine = FunctionEngine(lambda prompts, trainer: answer, None, lambda: (2,))
    return engine.generate(MODEL, REQUESTS, Sampling(1.0, 8, (2,)))


def completions(answer):
    return [one for group in groups(answer) for one in group.completions]


def test_ids_and_log_probs_come_back_as_they_are():
    """R24: of what it is trained on; a log-prob that is None or NaN was not scored."""
    found = completions(PLAIN)
    assert [one.ids.tolist() for one in found] == PLAIN["completion_ids"]
    assert [group.prompt.tolist() for group in groups(PLAIN)] == [[5, 6, 7]] * 2
    assert [one.finish for one in found] == ["stop", "stop", "length", "stop"]
    assert found[0].logps.isnan().tolist() == [False, True, False]
    assert found[2].logps is None


@pytest.mark.parametrize("kind", [torch.tensor, numpy.array, tuple])
def test_values_may_be_tensors_arrays_or_tuples(kind):
    """Also fields that are one array for all; each completion has its own value of it."""
    same = {"completion_ids": [[20, 2], [21, 2], [22, 2], [23, 2]], "logprobs": [[-1.0, -2.0]] * 4}
    ragged = {name: [kind(one) for one in PLAIN[name]] for name in ("prompt_ids", "completion_ids")}
    ragged["logprobs"] = None
    assert [one.ids.tolist() for one in completions(ragged)] == PLAIN["completion_ids"]
    even = {name: kind(values) for name, values in {**PLAIN, **same}.items()}
    found = completions({**even, "turns": kind([3, 4, 5, 6]), "env_mask": kind([[1, 0]] * 4), "of_all": "same"})
    assert [one.fields for one in found] == [{"turns": turns, "of_all": "same"} for turns in (3, 4, 5, 6)]
    assert [one.written.tolist() for one in found] == [[True, False]] * 4
    assert found[3].logps.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"completion_ids": [[20, VOCABULARY], [2], [2], [2]]},
            f"returned {VOCABULARY} in 'completion_ids' of completion 0",
        ),
        ({"completion_ids": [[2], [-100], [2], [2]]}, "returned -100 in 'completion_ids' of completion 1"),
        ({"completion_ids": [[2], [20.5], [2], [2]]}, "returned 20.5 in 'completion_ids' of completion 1"),
        ({"completion_ids": ["text"] * 4}, "returned 't' in 'completion_ids' of completion 0; expected whole numbers"),
        (
            {"completion_ids": [[20] * 300, [2], [2], [2]]},
            "returned 303 tokens of a prompt with completion 0.* for 256",
        ),
        ({"completion_ids": [[2]] * 3}, "returned 3 'completion_ids' for 4 prompts"),
        ({"completion_ids": [[], [2], [2], [2]]}, "returned no token in 'completion_ids' of completion 0"),
        ({"prompt_ids": [[]] * 4}, "returned no token in 'prompt_ids' of completion 0"),
        ({"prompt_ids": [[5], [6], [5], [5]]}, r"other 'prompt_ids' for one prompt \(row 0\)"),
        ({"logprobs": [[-1.0]] * 4}, "returned 1 numbers in 'logprobs' for completion 0, which has 3 tokens"),
        (
            {"logprobs": [[-1.0, 0.5, -1.0], None, None, None]},
            "returned 0.5 in 'logprobs' of completion 0; expected log",
        ),
        (
            {"logprobs": [[[-1.0], [-1.0], [-1.0]], None, None, None]},
            r"returned \[-1.0\] in 'logprobs' of completion 0",
        ),
        ({"logprobs": [[-math.inf, -1.0, -1.0], None, None, None]}, "returned -inf in 'logprobs' of completion 0"),
        ({"env_mask": [[1, 0.5, 1], None, None, None]}, "returned 0.5 in 'env_mask' of completion 0; expected 0 and 1"),
        ({"finish": ["eos"] * 4}, "returned 'eos' in 'finish'; expected stop or length"),
    ],
)
def test_what_is_no_completion_is_refused_with_the_field(changed, said):
    with pytest.raises(RolloutError, match=f"rollout_func returned {said.removeprefix('returned ')}"):
        groups({**PLAIN, "logprobs": None, **changed})


def test_a_function_that_fails_or_returns_something_else_is_named():
    def fails(prompts, trainer):
        raise KeyError("env")

    async def later(prompts, trainer):
        return PLAIN

    for function, said in (
        (fails, r"rollout_func failed: KeyError: 'env' \(line \d+ of .*test_functions.py\). Correct it"),
        (lambda prompts: PLAIN, "rollout_func failed: TypeError: .* takes 1 positional argument"),
        (lambda prompts, trainer: None, "rollout_func returned a NoneType; expected a dictionary with prompt_ids"),
        (lambda prompts, trainer: {"prompt_ids": []}, "rollout_func returned no 'completion_ids'"),
    ):
        with pytest.raises(RolloutError, match=said):
            FunctionEngine(function, None, tuple).generate(MODEL, REQUESTS, Sampling(1.0, 8, (2,)))
    waiting = later([], None)
    with pytest.raises(RolloutError, match="rollout_func returned a coroutine; expected a dictionary"):
        groups(waiting)
    waiting.close()
