"""`tether eval --judge` and `tether export`, from the outside."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cli.after.runs import Run

LONGER = "def longer(prompt, first, second):\n    return float(len(first) > len(second))\n"
BRIEF = "def brief(completions, **_):\n    return [-len(one) for one in completions]\n"


@pytest.mark.slow
def test_win_rate_by_a_function_and_by_a_reward(run: Run, call: Any) -> None:
    (run.path / "judges.py").write_text(LONGER + BRIEF)
    options = ("--max-new-tokens", "12", "--temperature", "1", "--json", "--no-kl")
    longer = json.loads(call("eval", "out", "--data", "held_out.jsonl", "--judge", "judges.py:longer", *options)[0])
    brief = json.loads(call("eval", "out", "--data", "held_out.jsonl", "--judge", "judges.py:brief", *options)[0])
    found, other = longer["win_rate"], brief["win_rate"]
    assert found["judged"] == found["wins"] + found["ties"] + found["losses"] == 8
    # One prefers long answers and the other short ones, of the same texts.
    assert (found["wins"], found["ties"], found["losses"]) == (other["losses"], other["ties"], other["wins"])
    assert longer["overall"]["pairs"] == 8
    said = call("eval", "out", "--data", "held_out.jsonl", "--judge", "judges.py:longer", "--no-kl")[0]
    assert "win rate of out over out:reference by longer" in said
    assert "at equal length" in said


def test_prompts_alone_give_the_win_rate_alone(run: Run, call: Any) -> None:
    (run.path / "judges.py").write_text(LONGER)
    run.place.write_rows([{"prompt": f"film {n}"} for n in range(3)], "only.jsonl")
    options = ("--judge", "judges.py:longer", "--max-new-tokens", "3", "--reference", "out", "--json")
    found = json.loads(call("eval", "out", "--data", "only.jsonl", *options)[0])
    assert found.keys() == {"win_rate"}
    assert found["win_rate"]["prompts"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--judge", "nothing.py:f"), "A judge is 'nothing.py:f', and there is no file nothing.py"),
        (("--judge", "judges.py:one"), "prompt, first and second"),
        (("--judge-model", "x"), "belong to --judge"),
        (("--judge", "judges.py:longer", "--judge-key-env", "X"), "server's address"),
        (("--judge", "judges.py:longer", "--reference", "none"), "--reference"),
    ],
)
def test_a_wrong_judge_is_said_before_weights_load(run: Run, call: Any, arguments: tuple[str, ...], words: str) -> None:
    (run.path / "judges.py").write_text(LONGER + "def one(x):\n    return 1\n")
    assert words in call("eval", "out", "--data", "held_out.jsonl", *arguments, code=2)[1]


def test_export_says_what_fits(run: Run, call: Any) -> None:
    found = {one["name"]: one for one in json.loads(call("export", "out", "--json")[0])}
    assert found["vLLM"]["fits"]
    assert "--max-lora-rank 8" in found["vLLM"]["commands"][0]
    whole = {one["name"]: one for one in json.loads(call("export", "model", "--json")[0])}
    assert "convert_hf_to_gguf.py" in whole["llama.cpp"]["commands"][0]
    assert "no folder" in call("export", "out:reference", code=2)[1]
