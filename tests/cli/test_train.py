"""`tether train` from a run file to a run folder, and on from a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file

from tether.cli.main import app
from tether.config import load_run_file

Tether = Callable[..., tuple[int, str, str]]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_is_written_whole_and_a_resumed_run_ends_where_it_would_have(
    workplace: Any, tether: Tether
) -> None:
    code, out, err = tether("train", "run.yaml", "train.learning_rate=2e-3")
    assert code == 0, err
    run = workplace.path / "out"
    made = {path.name for path in run.iterdir()}
    assert made >= {"config.yaml", "reference.json", "data.json", "metrics.jsonl", "report.html"}
    assert made >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "checkpoint-3",
        "checkpoint-6",
    }
    # The last step is evaluated while the run goes on: a tracker takes what is logged after its end for another run.
    logged = metrics_of(run)
    evaluated = [number for number, line in enumerate(logged) if "eval_rewards/accuracies" in line]
    assert len(evaluated) == 1
    assert logged[evaluated[0]]["step"] == 6
    assert "train_runtime" in logged[-1]
    assert evaluated[0] < len(logged) - 1

    resolved = load_run_file(run / "config.yaml")
    assert resolved.to_dict() == load_run_file("run.yaml", ["train.learning_rate=2e-3"]).to_dict()
    reference = json.loads((run / "reference.json").read_text())
    assert (reference["identity"]["meaning"], reference["identity"]["method"]) == ("start", "adapter_off")
    assert reference["guard"]["passed"]
    assert set(json.loads((run / "data.json").read_text())) >= {"train", "eval"}
    logs = metrics_of(run)
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    assert len(losses) == 6
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < losses[0]
    for said in ("train: 24 of 24 pairs", "scoring: ", "reference: start", "start equality", "batch: 4 pairs per step"):
        assert said in err
    assert "step 6/6  loss 0." in err
    assert "\x1b" not in err
    assert "{'loss'" not in err + out
    assert "it/s]" not in err + out
    assert out.splitlines()[0].startswith("trained 6 steps  loss 0.")
    assert "report: out/report.html" in out.splitlines()

    whole = load_file(run / "adapter_model.safetensors")
    shutil.rmtree(run / "checkpoint-6")
    (run / "adapter_model.safetensors").unlink()
    code, out, err = tether("train", "run.yaml", "train.learning_rate=2e-3", "--resume")
    assert code == 0, err
    assert "step 3/6" not in err
    assert [entry["step"] for entry in metrics_of(run) if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    for name, tensor in load_file(run / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_same_run_file_trains_the_same(workplace: Any, tether: Tether) -> None:
    results = []
    for name in ("a", "b"):
        assert tether("train", "run.yaml", f"output={name}", "train.max_steps=2", "data.eval=null")[0] == 0
        results.append(load_file(workplace.path / name / "adapter_model.safetensors"))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_without_an_adapter_the_model_itself_is_trained_and_saved(workplace: Any, tether: Tether) -> None:
    code, out, err = tether("train", "run.yaml", "lora=null", "train.max_steps=2", "train.learning_rate=1e-5")
    assert code == 0, err
    assert (workplace.path / "out" / "model.safetensors").is_file()
    assert "reference: start, by snapshot" in err
    assert "model and tokenizer: out" in out


def test_an_evaluation_at_the_last_step_is_not_repeated(workplace: Any, tether: Tether) -> None:
    overrides = [
        "train.max_steps=2",
        "train.eval_strategy=steps",
        "train.eval_steps=1",
        "data.eval={a: held_out.jsonl}",
    ]
    code, out, err = tether("train", "run.yaml", *overrides)
    assert code == 0, err
    assert [entry["step"] for entry in metrics_of(workplace.path / "out") if "eval_a_loss" in entry] == [1, 2]
    assert "eval_a at step 2  loss" in err
    assert "\neval_a  loss" in out


def test_an_interrupted_run_says_how_to_go_on(workplace: Any, tether: Tether, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tether.training.DPOTrainer.train", interrupt)
    code, out, err = tether("train", "run.yaml")
    assert (code, out) == (130, "")
    assert "Stopped, before the first checkpoint was written." in err
    (workplace.path / "out" / "checkpoint-3").mkdir()
    code, _, err = tether("train", "run.yaml", "--resume")
    assert (code, "There is no whole checkpoint in out to resume from." in err) == (2, True)
    (workplace.path / "out" / "checkpoint-3" / "manifest.json").write_text('{"files": {}}')
    code, _, err = tether("train", "run.yaml", "--resume", "train.seed=1")
    assert code == 130
    assert "go on from it with: tether train run.yaml train.seed=1 --resume" in err

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the machine gave up")

    monkeypatch.setattr("tether.training.DPOTrainer.train", fail)
    code, _, err = tether("train", "run.yaml", "--resume")
    assert code == 1
    assert "The run failed. The last checkpoint is out/checkpoint-3; go on from it with: tether train run.yaml" in err


@pytest.mark.parametrize(
    ("arguments", "resume", "overrides"),
    [
        (["--resume"], "last", []),
        (["--resume", "out/checkpoint-4", "a.b=1"], "out/checkpoint-4", ["a.b=1"]),
        (["--resume=out", "a.b=1"], "out", ["a.b=1"]),
        (["--resume", "model=runs/x/checkpoint-3"], "last", ["model=runs/x/checkpoint-3"]),
        (["--resume", "."], ".", []),
    ],
)
def test_a_checkpoint_may_be_named_behind_resume(arguments: list[str], resume: str, overrides: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    for given in (
        ["run.yaml", *arguments],
        [*arguments, "run.yaml"] if len(arguments) == 1 else ["run.yaml", *arguments],
    ):
        found = command.commands["train"].make_context("train", list(given), resilient_parsing=True).params
        assert (str(found["run_file"]), found["resume"], list(found["overrides"] or [])) == (
            "run.yaml",
            resume,
            overrides,
        )
