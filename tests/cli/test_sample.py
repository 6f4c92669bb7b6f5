"""`tether sample` and `tether rollouts`: rows that `tether train` reads, and what a run has sampled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tether.training.online.preferences import Answered, Making, rows_of

Tether = Callable[..., tuple[int, str, str]]
RUN = """\
model: model
data: {train: prompts.jsonl}
objective: {loss: online_dpo, pairs: [ipo], beta: 0.2}
rewards:
  - {python: "mine.py:short", weight: 2.0}
  - {python: "mine.py:wanted"}
rollout: {group: 4, max_tokens: 6}
train: {max_steps: 2, learning_rate: 1e-3, batch_size: 2, logging_steps: 1, save_steps: 1, use_cpu: true}
output: out
"""
REWARDS = """\
def short(completion_ids, **_):
    return [-sum(ids) % 7 for ids in completion_ids]


def wanted(completion_ids, want):
    return [None if w == 3 else float(w in ids) for ids, w in zip(completion_ids, want)]
"""


@pytest.fixture
def prompts(workplace: Any) -> Any:
    workplace.write_rows([{"prompt": f"the film {n}", "want": n} for n in range(6)], "prompts.jsonl")
    (workplace.path / "run.yaml").write_text(RUN, encoding="utf-8")
    (workplace.path / "mine.py").write_text(REWARDS, encoding="utf-8")
    return workplace


def read(path: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_sampled_rows_train(prompts: Any, tether: Tether) -> None:
    """Pairs, lists and labels of one sampling agree with each other, and `tether train` reads each of them."""
    found = {}
    for form in ("pairs", "ranked", "unpaired"):
        code, out, err = tether("sample", "run.yaml", "--as", form, "--to", f"sampled_{form}.jsonl", "--truncated")
        assert code == 0, err
        assert "6 prompts, 24 completions" in out
        found[form] = read(prompts.path / f"sampled_{form}.jsonl")
        assert f"{len(found[form])} rows: sampled_{form}.jsonl" in out
    lists = {row["prompt"]: row for row in found["ranked"]}
    for row in found["pairs"]:
        ranked = lists[row["prompt"]]
        assert (row["chosen"], row["rejected"]) == (ranked["completions"][0], ranked["completions"][-1])
        assert ranked["scores"] == sorted(ranked["scores"], reverse=True)
        assert (row["score_chosen"], row["score_rejected"]) == (ranked["scores"][0], ranked["scores"][-1])
    assert len(found["pairs"]) == len(lists) > 3
    labels = {(row["prompt"], row["completion"]): row["label"] for row in found["unpaired"]}
    assert all(
        labels[row["prompt"], row["chosen"]] and not labels[row["prompt"], row["rejected"]] for row in found["pairs"]
    )
    for form, loss in (("pairs", "sigmoid"), ("ranked", "plackett_luce"), ("unpaired", "kto")):
        (prompts.path / "next.yaml").write_text(
            f"model: model\ndata: {{train: sampled_{form}.jsonl}}\nobjective: {{loss: {loss}}}\n"
            f"train: {{max_steps: 1, batch_size: 2, use_cpu: true}}\noutput: {form}-out\n",
            encoding="utf-8",
        )
        code, _, err = tether("train", "next.yaml")
        assert code == 0, err


def test_what_sample_refuses(prompts: Any, tether: Tether) -> None:
    (prompts.path / "there.jsonl").write_text("", encoding="utf-8")
    for arguments, said in (
        (["--to", "there.jsonl"], "there.jsonl exists"),
        (["--as", "ranked", "--margin", "1"], "--margin is of pairs"),
        (["--threshold", "1"], "--threshold is of labelled completions"),
        (["rewards=null"], "`rewards` is missing"),
    ):
        code, _, err = tether("sample", "run.yaml", *arguments)
        assert code == 2
        assert said in err


def test_online_dpo_runs_and_its_rollouts_are_shown_and_scored(prompts: Any, tether: Tether) -> None:
    code, _, err = tether("train", "run.yaml")
    assert code == 0, err
    assert "pairs: the best and the worst of 4 by short, wanted" in err
    steps = [row for row in read(prompts.path / "out" / "metrics.jsonl") if "loss" in row]
    assert steps[0]["kl/k1"] == 0.0
    assert steps[0]["rewards/margins"] == 0.0
    assert {"reward", "rewards/short/mean", "rewards/accuracies"} <= steps[1].keys()
    code, out, _ = tether("rollouts", "show", "out", "--step", "0")
    assert code == 0
    assert "rollout 0 of 2: 2 prompts, 8 completions, mean reward" in out
    assert out.index("the film") < out.index("short ")
    assert out.count("\nrow ") == 2
    code, out, _ = tether("rollouts", "show", "out", "--step", "0", "--prompts", "1", "--whole")
    assert (code, out.count("\nrow ")) == (0, 1)
    code, out, _ = tether("rollouts", "show", "out", "--prompts", "1", "--json")
    found = json.loads(out)
    assert (code, found["rollout"], found["of"]) == (0, 1, 2)
    assert [set(one["rewards"]) for one in found["groups"][0]] == [{"short", "wanted"}] * 4
    again = ["--reward", "{python: 'mine.py:short', weight: 3}", "--reward", "{name: length, target: 4}"]
    code, out, err = tether("rollouts", "score", "out", *again, "--to", "scored.jsonl")
    assert code == 0, err
    assert "16 completions of 2 rollouts" in out
    rows = read(prompts.path / "scored.jsonl")
    assert len(rows) == 16
    assert all(row["rewards"]["short"] == row["trained_on"]["short"] for row in rows)
    code, _, err = tether("rollouts", "score", "out", "--reward", "numeric_answer")
    assert code == 2
    assert "'numeric_answer' needs 'answer'" in err
    code, _, err = tether("rollouts", "show", "model")
    assert code == 1
    assert "no rollouts in model" in err


def test_rows_of_a_prompt() -> None:
    """No ties in lists, no pair within the margin, no label at the threshold."""
    one = Answered({"prompt": "Q", "tools": [], "other": 1}, ("a", "b", "c"), (1.0, 1.0, 3.0))
    (ranked,) = rows_of(one, Making("ranked"))
    assert ranked == {"prompt": "Q", "tools": [], "completions": ["c", "a"], "scores": [3.0, 1.0]}
    assert rows_of(one, Making("pairs", margin=2.0)) == []
    assert rows_of(one, Making("pairs", margin=1.9))[0]["chosen"] == "c"
    found = rows_of(one, Making("unpaired", threshold=1.0))
    assert [(row["completion"], row["label"]) for row in found] == [("c", True)]
    assert rows_of(Answered({"prompt": "Q"}, ("a",), (1.0,)), Making("unpaired")) == []
    assert rows_of(Answered({"prompt": "Q"}, ("a", "b"), (1.0, 1.0)), Making("ranked")) == []
