"""The rollout benchmark: everyone samples what is asked for, in turns; what does not count is said."""

from __future__ import annotations

import pytest

import rollout
from tiny import tiny_model, tiny_tokenizer

SPEC = {"prompts": [[5, 6, 7], [6]], "group": 2, "completion": 5, "ends": False, "folder": None}


def runs(different=0.0, **lengths):
    told = {"tree": [1.0, 2.0, 4.0], "transformers": [4.0, 4.0, 5.0], "trl": [8.0, 10.0, 9.0]}
    found = {tool: {"seconds": told[tool], "lengths": [lengths.get(tool, [5, 5, 5, 5])] * 3} for tool in rollout.TOOLS}
    return {**found, "different": different}


def test_figures_are_medians_and_ratios_of_tokens_a_second():
    speeds = rollout.medians(runs())
    assert speeds == {"tree": 10.0, "transformers": 5.0, "trl": pytest.approx(20 / 9)}
    assert rollout.figures(speeds) == ("10", "5", "2", "2.0 ×", "4.5 ×")
    assert len(rollout.HEADER) == 2 + len(rollout.figures(speeds))


@pytest.mark.parametrize(
    ("wrong", "ends", "said"),
    [
        ({}, False, []),
        ({"trl": [5, 5, 5, 4]}, False, ["2 completions: trl sampled 4 of 4 to 5 tokens"]),
        ({"trl": [5, 5, 5, 4]}, True, []),
        ({"tree": [5, 5, 5]}, True, ["2 completions: tree sampled 3 of 5 to 5 tokens"]),
        ({"different": 0.2}, True, ["2 completions: our engines differ at 20% of the tokens"]),
    ],
)
def test_runs_that_do_not_count_are_named(wrong, ends, said):
    assert rollout.check({**SPEC, "ends": ends}, runs(**wrong)) == said


def test_places_that_differ_are_counted():
    assert rollout.different([[1, 2, 3], [4]], [[1, 2, 3], [4]]) == 0.0
    assert rollout.different([[1, 2, 3], [4]], [[1, 9], [4]]) == 0.5


def test_turns_are_interleaved_and_the_first_is_not_timed():
    order = []

    def call(tool):
        return lambda: order.append(tool) or [[1, 2]]

    found = rollout.in_turns({tool: call(tool) for tool in rollout.TOOLS}, repeats=2)
    assert order == [*rollout.TOOLS, "transformers", "trl", "tree", "trl", "tree", "transformers"]
    assert all(found[tool]["lengths"] == [[2], [2]] and len(found[tool]["seconds"]) == 2 for tool in rollout.TOOLS)
    assert found["different"] == 0.0


@pytest.mark.parametrize("ends", [False, True])
def test_three_samplers_give_what_is_asked_for(ends, tmp_path):
    """On a tiny model, TRL through its own trainer."""
    pytest.importorskip("trl")
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    spec = {**SPEC, "ends": ends, "folder": str(tmp_path), "completion": 40 if ends else 5}
    calls = rollout.our_calls(tiny_model(**sizes), spec)
    calls["trl"] = rollout.trl_call(tiny_model(**sizes), tokenizer, spec)
    found = rollout.in_turns(calls, repeats=1)
    assert rollout.check(spec, found) == []
    assert found["different"] == 0.0
    shortest = min(found[tool]["lengths"][0][k] for tool in rollout.TOOLS for k in range(4))
    assert (shortest < spec["completion"]) == ends
