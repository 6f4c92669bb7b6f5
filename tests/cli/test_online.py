"""`tether train` with sampled completions: keys of the run file, rewards from a file, a failure on the way, resume."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import yaml

from tether.config import build, check_run, json_schema, load_run_file
from tether.errors import ConfigError
from tether.training import GRPOConfig, RLOOConfig

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "grpo_arithmetic"
Tether = Callable[..., tuple[int, str, str]]
RUN = """\
model: model
data: {train: sums.jsonl, eval: sums.jsonl}
objective: {loss: grpo, beta: 0.1}
rewards:
  - {name: numeric_answer, column: answer}
  - {python: "mine.py:short", weight: 0.5}
rollout: {group: 4, max_tokens: 6}
train: {max_steps: 3, learning_rate: 1e-3, batch_size: 2, logging_steps: 1, save_steps: 1, use_cpu: true}
output: out
"""
REWARD = "def short(completion_ids, **_):\n    return [-len(ids) / 10 for ids in completion_ids]\n"


@pytest.fixture
def sums(workplace: Any) -> Any:
    workplace.write_rows([{"prompt": f"{a}+{a}=", "answer": 2 * a} for a in range(8)], "sums.jsonl")
    (workplace.path / "run.yaml").write_text(RUN, encoding="utf-8")
    (workplace.path / "mine.py").write_text(REWARD, encoding="utf-8")
    return workplace


def test_a_run_file_samples_and_trains(sums: Any, tether: Tether) -> None:
    code, _, err = tether("train", "run.yaml")
    assert code == 0, err
    assert "rollouts: tree engine, at most" in err
    assert "batch: 8 completions per step" in err
    assert "start equality" in err
    run = sums.path / "out"
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [log for log in logs if "loss" in log]
    assert len(steps) == 3
    assert steps[0]["kl"] == 0.0
    assert {"reward", "rewards/numeric_answer/mean", "rewards/short/mean"} <= steps[0].keys()
    assert [log["step"] for log in logs if "eval_reward" in log] == [3]
    kept = parquet.read_table(run / "rollouts" / "000002-0.parquet").to_pylist()
    assert len(kept) == 8
    assert json.loads(kept[0]["rewards"]).keys() == {"numeric_answer", "short"}
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["rollout"]["group"] == 4
    assert resolved["rewards"][0]["column"] == "answer"
    again = check_run(resolved)
    assert again.to_dict() == resolved
    assert (run / "report.html").is_file()


def test_a_reward_that_raises_is_named_and_the_run_goes_on_after_repair(sums: Any, tether: Tether) -> None:
    broken = "calls = []\n" + REWARD.replace(
        "    return", "    calls.append(1)\n    assert len(calls) < 3, 'odd'\n    return"
    )
    (sums.path / "mine.py").write_text(broken, encoding="utf-8")
    code, _, err = tether("train", "run.yaml")
    assert code == 1
    assert "reward function 'short' failed on" in err
    assert "steps before it are kept in out/checkpoint-" in err
    (sums.path / "mine.py").write_text(REWARD, encoding="utf-8")
    code, _, err = tether("train", "run.yaml", "--resume")
    assert code == 0, err
    assert "trained 3 steps" in err or (sums.path / "out" / "model.safetensors").is_file()


def test_a_plan_has_the_whole_policy_while_shards_sample(sums: Any, tether: Tether) -> None:
    def memory(*more: str) -> dict[str, int]:
        code, out, err = tether("plan", "run.yaml", "--gpu", "80GiB", "--json", *more)
        assert code == 0, err
        return json.loads(out)["memory"]

    one, cut = memory(), memory("--gpus", "2", "--fsdp")
    assert cut["weights"] == one["weights"] // 2
    assert cut["rollouts"] == one["rollouts"] + one["weights"]


def test_a_wrong_signature_is_known_before_weights_load(sums: Any, tether: Tether) -> None:
    (sums.path / "mine.py").write_text("def short(completions, gold):\n    return []\n", encoding="utf-8")
    (sums.path / "model" / "model.safetensors").write_bytes(b"no weights")
    code, _, err = tether("train", "run.yaml")
    assert code == 2
    assert "'short' needs 'gold', and the rows have the columns answer, prompt" in err


def values(**sections: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "data": {"train": "rows.jsonl"},
        "rewards": [{"name": "numeric_answer"}],
        "train": {"use_cpu": True},
        **sections,
    }


@pytest.mark.parametrize(
    ("loss", "config", "stands_for"),
    [
        ("dapo", GRPOConfig, {}),
        ("grpo", GRPOConfig, {}),
        ("dr_grpo", GRPOConfig, {"scale_rewards": "none"}),
        ("gspo", GRPOConfig, {}),
        ("cispo", GRPOConfig, {"epsilon_high": 5.0}),
        ("sapo", GRPOConfig, {}),
        ("reinforce", GRPOConfig, {}),
        ("rloo", RLOOConfig, {"beta": 0.05}),
    ],
)
def test_a_name_stands_for_trainer_and_options(loss: str, config: Any, stands_for: dict[str, Any]) -> None:
    rollout = {
        "group": 4,
        "max_tokens": 9,
        "temperature": 0.7,
        "top_k": 5,
        "updates": 1,
        "correction": False,
        "seed": 4,
    }
    run = check_run(values(objective={"loss": loss}, rollout=rollout))
    args, _, keywords = build(run)
    assert type(args) is config
    assert args.per_device_train_batch_size == 8 * 4
    assert (args.num_generations, args.max_completion_length, args.temperature, args.top_k) == (4, 9, 0.7, 5)
    assert (args.vllm_importance_sampling_correction, args.rollout_seed) == (False, 4)
    for name, value in stands_for.items():
        assert getattr(args, name) == value
    assert [one.__name__ for one in keywords["reward_funcs"]] == ["numeric_answer"]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"objective": {"loss": "sigmoid"}}, "`rewards` was given with loss 'sigmoid', whose rows have completions"),
        ({"objective": {"loss": "grpo"}, "rewards": None}, "`rewards` is missing: loss 'grpo' samples completions"),
        ({"rewards": [{"name": "numeric"}]}, "ready-made are numeric_answer"),
        ({"rewards": [{"name": "regex"}]}, "'regex' got the options {} and takes pattern"),
        ({"rewards": [{"name": "length", "python": "a.py:b"}]}, "a reward has one of them"),
        ({"rewards": [{"python": "a.py:b", "n": 2}]}, "which a ready-made reward"),
        ({"rewards": [{"python": "a.py:b"}]}, "is 'a.py:b', and there is no file a.py"),
        ({"rewards": [{"judge": {"url": "http://h", "by": "votes"}}]}, "by"),
        ({"rewards": [{"judge": {"url": "http://h", "instructions": "Good?"}}]}, "The judge's instructions have no"),
        ({"rewards": [{"judge": {"url": "http://h", "tolerance": 0.1}}]}, "which a judge does not give"),
        ({"rollout": {"groups": 4}}, "group"),
        ({"rollout": {"temperature": 0}}, "temperature"),
        ({"train": {"max_length": 64}}, "`train.max_length` is said by `rollout.max_prompt`"),
        ({"train": {"num_generations": 4}}, "`train.num_generations` is said by `rollout.group`"),
        ({"train": {"use_vllm": True}}, "use_vllm"),
        ({"objective": {"loss": "grpo", "entropy_target": 0.1}}, "use_adaptive_entropy is False"),
        ({"rollout": {"generation_kwargs": {"top_p": 0.9}}}, "generation_kwargs"),
    ],
)
def test_what_cannot_be_is_refused_with_the_key(sections: dict[str, Any], said: str) -> None:
    given = values(**{"objective": {"loss": "grpo"}, **sections})
    with pytest.raises(ConfigError) as caught:
        build(check_run(given))
    assert said in str(caught.value)


def test_the_example_trains_as_it_is(tmp_path: Path, tether: Tether, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model after two steps instead of 400, and two steps of its run file."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import make_model

    make_model.main(tmp_path / "made", steps=2)
    made = tmp_path / "made"
    changed = [f"model={made / 'model'}", f"data.train={made / 'sums.jsonl'}", f"data.eval={made / 'sums.jsonl'}"]
    shorter = ["train.max_steps=2", "train.logging_steps=1", "train.eval_steps=2", f"output={tmp_path / 'out'}"]
    code, out, err = tether("train", str(EXAMPLE / "run.yaml"), *changed, *shorter)
    assert code == 0, err
    logs = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    before, after = (log for log in logs if "eval_reward" in log)
    assert (before["step"], after["step"]) == (0, 2)
    found = re.search(r"reward of eval: (\S+) at step 0, (\S+) at step 2 in \d+ s; change (\S+) \(95 % interval", out)
    assert found is not None, out
    numbers = [before["eval_reward"], after["eval_reward"], after["eval_reward"] - before["eval_reward"]]
    assert [float(one) for one in found.groups()] == pytest.approx(numbers, abs=6e-4)
    interval = json.loads((tmp_path / "out" / "evaluation.json").read_text())["reward"]
    assert interval["high"] - interval["value"] == pytest.approx(1.96 * after["eval_reward_error"])
    assert parquet.read_table(tmp_path / "out" / "rollouts" / "000001-0.parquet").num_rows == 160


SENTIMENT = EXAMPLE.parent / "grpo_sentiment"


def test_the_example_of_sentiment_is_a_run_file_with_two_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """One judge is the reward, the other, made of other data, looks on; both tell praise from scorn."""
    pytest.importorskip("vaderSentiment")
    monkeypatch.chdir(EXAMPLE.parents[1])
    args, adapter, keywords = build(load_run_file(SENTIMENT / "run.yaml"))
    assert isinstance(args, RLOOConfig)
    assert (args.beta, args.num_generations, args.reward_weights) == (0.02, 8, [1.0, 0.0])
    assert adapter is not None
    texts = [" is a wonderful film, and I loved it.", " is a terrible mess, boring and bad."]
    for judge in keywords["reward_funcs"]:
        good, bad = judge(completions=texts)
        assert good > bad + 0.2


@pytest.mark.slow
def test_the_example_of_sentiment_raises_its_reward(
    tmp_path: Path, tether: Tether, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its page says to run it; by more than the interval of the change, and the KL begins at 0."""
    pytest.importorskip("vaderSentiment")
    monkeypatch.chdir(EXAMPLE.parents[1])
    runpy.run_path(str(SENTIMENT / "make_model.py"))["main"](tmp_path)
    own = (f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}", "train.logging_steps=1")
    code, out, err = tether("train", str(SENTIMENT / "run.yaml"), *own)
    assert code == 0, err
    found = re.search(r"95 % interval (\S+) to", out)
    assert found is not None
    assert float(found[1]) > 0
    logs = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    kls = [log["kl"] for log in logs if "kl" in log]
    assert kls[0] == 0.0
    assert kls[-1] > 0.0


def test_the_recipe_for_a_gpu_is_a_run_file() -> None:
    """It has been run nowhere here; its keys and values are checked all the same."""
    run = load_run_file(EXAMPLE.parent / "grpo_gsm8k" / "run.yaml", ["train.use_cpu=true"])
    args, adapter, keywords = build(run)
    assert (args.rollout_engine, args.vllm_url, args.zero_variance) == ("vllm", None, "resample")
    assert adapter is not None
    assert keywords["train_dataset"]["fields"] == {"prompt": "question"}


def test_the_schema_has_rewards_rollouts_and_the_losses() -> None:
    schema = json_schema()
    assert {"rewards", "rollout"} <= schema["properties"].keys()
    losses = [
        part["properties"]["loss"]["enum"]
        for part in schema["$defs"]["Objective"]["oneOf"]
        if "enum" in part["properties"]["loss"]
    ]
    assert ["grpo", "dapo", "dr_grpo", "bnpo", "gspo", "cispo", "sapo", "luspo", "vespo", "reinforce"] in losses
    assert ["rloo"] in losses
    assert ["online_dpo"] in losses
    group = schema["$defs"]["Rollout"]["properties"]["group"]
    assert group["default"] == 8
