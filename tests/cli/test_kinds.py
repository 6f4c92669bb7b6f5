"""`tether train` for every kind of trainer, named by its loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tether.config import build, check_run, trainer_class
from tether.errors import ConfigError
from tether.training import CPOConfig, DPOConfig, KTOConfig, SFTConfig

Tether = Callable[..., tuple[int, str, str]]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "trainers"


def completions(workplace: Any) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in workplace.pairs()]


@pytest.mark.parametrize(
    ("loss", "trainer"),
    [
        ("kto", "KTO"),
        ("bco", "KTO"),
        ("orpo", "ORPO"),
        ("simpo", "CPO"),
        ("cpo", "CPO"),
        ("sft", "SFT"),
        ("reward", "Reward"),
    ],
)
@pytest.mark.sweep(3)
def test_a_run_file_trains_what_its_loss_says(loss: str, trainer: str, workplace: Any, tether: Tether) -> None:
    """Model, records and report are written, and the resolved run file says what was trained."""
    if loss == "sft":
        for name in ("pairs.jsonl", "held_out.jsonl"):
            workplace.write_rows(completions(workplace), name)
    beta = "" if loss in ("sft", "reward") else ", beta: 0.2"
    workplace.edit("objective: {beta: 0.1}", f"objective: {{loss: {loss}{beta}}}")
    code, _, err = tether("train", "run.yaml")
    assert code == 0, err
    run = workplace.path / "out"
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # A pair that is read as two labelled completions is two rows.
    assert sum("loss" in log for log in logs) == (12 if trainer == "KTO" else 6)
    evaluated = next(log for log in reversed(logs) if "eval_loss" in log)
    assert evaluated["step"] == logs[-1]["step"]
    meaning = json.loads((run / "reference.json").read_text())["identity"]["meaning"]
    assert meaning == ("start" if trainer == "KTO" else "none")
    assert ("start equality" in err) == (trainer == "KTO")
    assert trainer_class(loss).__name__ == f"{trainer}Trainer"
    assert (run / "report.html").is_file()
    assert (run / "adapter_model.safetensors").is_file()
    assert f"batch: 4 {'rows' if trainer in ('KTO', 'SFT') else 'pairs'} per step" in err
    assert yaml.safe_load((run / "config.yaml").read_text())["objective"]["loss"] == loss
    pairs = trainer in ("ORPO", "CPO", "Reward")
    if pairs:
        found = json.loads((run / "evaluation.json").read_text())
        assert found["reward_accuracy"]["n"] == 8
        if loss != "reward":
            margin, half = found["reward_margin"], 2.3646 * evaluated["eval_rewards/margins_std"] / 7**0.5
            assert margin["value"] == evaluated["eval_rewards/margins"]
            assert (margin["high"] - margin["low"]) / 2 == pytest.approx(half, rel=1e-3)
    if loss == "reward":
        assert json.loads((run / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def run_with(**sections: Any) -> Any:
    return check_run({"model": "tiny", "data": {"train": "rows.jsonl"}, "output": "unused", **sections})


def test_options_of_each_trainer_arrive() -> None:
    arguments = build(run_with(objective={"loss": "kto", "beta": 0.3, "desirable_weight": 1.5}))[0]
    assert isinstance(arguments, KTOConfig)
    assert (arguments.loss_type, arguments.beta, arguments.desirable_weight) == ("kto", 0.3, 1.5)
    simpo = build(run_with(objective={"loss": "simpo"}))[0]
    assert isinstance(simpo, CPOConfig)
    assert (simpo.loss_type, simpo.cpo_alpha, simpo.reference) == ("simpo", 0.0, "none")
    assert build(run_with(objective={"loss": "simpo", "cpo_alpha": 0.5}))[0].cpo_alpha == 0.5  # type: ignore[attr-defined]
    sft = build(run_with(objective={"loss": "sft", "assistant_only_loss": True}, lora={"dropout": 0.1}))[0]
    assert isinstance(sft, SFTConfig)
    assert sft.assistant_only_loss
    assert isinstance(build(run_with(objective={"loss": ["sigmoid", "sft"]}))[0], DPOConfig)


@pytest.mark.parametrize(("loss", "rate"), [("sigmoid", 1e-6), ("kto", 1e-6), ("sft", 2e-5), ("reward", 1e-4)])
def test_learning_rates_are_the_trainers_own(loss: str, rate: float) -> None:
    """The resolved run file shows the default that is used."""
    run = run_with(objective={"loss": loss})
    assert run.to_dict()["train"]["learning_rate"] == build(run)[0].learning_rate == rate
    assert build(run_with(objective={"loss": loss}, train={"learning_rate": 0.5}))[0].learning_rate == 0.5


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"objective": {"loss": "kto", "desirable_wieght": 2.0}}, "Did you mean `objective.desirable_weight`"),
        ({"objective": {"loss": "kto", "desirable_weight": "much"}}, "`objective.desirable_weight` is 'much'"),
        ({"objective": {"loss": "kto", "label_smoothing": 0.1}}, "does not apply to loss 'kto'; it takes beta"),
        (
            {"objective": {"loss": "kto", "desirable_weight": -1.0}},
            "`objective.desirable_weight` is -1.0 .a number with a fraction.; allowed is a number above 0",
        ),
        (
            {"objective": {"loss": "sigmoid", "desirable_weight": 2.0}},
            "does not apply to loss 'sigmoid'; it takes weights, beta",
        ),
        ({"objective": {"loss": "kto"}, "train": {"desirable_weight": 2.0}}, "is said by `objective.desirable_weight`"),
        ({"objective": {"loss": "orpo"}, "reference": "start"}, "compares with no reference"),
        ({"objective": {"loss": "reward"}, "reference": {"model": "other"}}, "compares with no reference"),
        ({"objective": {"loss": "kot"}}, "kot"),
    ],
)
def test_wrong_options_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(run_with(**sections))


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
@pytest.mark.sweep(1)
def test_the_examples_train(name: str, workplace: Any, tether: Tether, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run file of `examples/trainers`, as it is, for one step of a tiny model."""
    monkeypatch.chdir(EXAMPLES.parents[1])
    small = ["train.max_steps=1", "train.batch_size=4", "train.use_cpu=true", "train.logging_steps=1"]
    place = [f"model={workplace.path / 'model'}", f"output={workplace.path / 'out'}"]
    code, _, err = tether("train", str(EXAMPLES / f"{name}.yaml"), *small, *place)
    assert code == 0, err
    assert "step 1/1" in err
