"""`tether plan`, `tether init` and `tether doctor`: what they say before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tether.cli.main import main
from tether.models import load_policy
from tether.plan.replay import StepBytes


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace.path)
    return workplace


@pytest.fixture
def without_step(monkeypatch):
    """No step is followed, which takes longest: for what is said of anything else."""
    monkeypatch.setattr("tether.plan.estimate.replay", lambda *_: StepBytes(0, 0, 0))


def planned(capsys, *arguments: str, code: int = 0) -> dict:
    assert main(["plan", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_it_counts_what_the_run_will_have(here, capsys):
    found = planned(capsys, "run.yaml")
    whole = load_policy("model").num_parameters()
    # Rank 4 on each linear layer of the layers: (in + out) * 4.
    wide = {name: p for name, p in load_policy("model").named_parameters() if p.dim() == 2 and "layers" in name}
    adapter = sum(4 * sum(p.shape) for p in wide.values())
    assert found["model"]["trainable"] == adapter
    assert found["model"]["parameters"] == whole + adapter
    assert found["memory"]["weights"] == 4 * (whole + adapter)
    assert found["memory"]["optimizer"] == 8 * adapter
    assert found["rows"]["rows"] == 24
    assert found["steps"] == 6
    assert (found["reference"]["meaning"], found["reference"]["method"]) == ("start", "adapter_off")
    assert found["memory"]["reference"] == 0
    assert found["notes"] == []  # the step was replayed, not estimated


def test_tokens_of_an_epoch_are_those_of_the_rows(here, capsys, without_step):
    rows = here.pairs()  # a token for each character, and an end for each completion
    answers = sum(len(row["chosen"]) + len(row["rejected"]) + 2 for row in rows)
    prompts = sum(len(row["prompt"]) for row in rows)
    found = planned(capsys, "run.yaml")["rows"]
    assert found["tokens"] == prompts + answers
    assert found["tokens_unshared"] == 2 * prompts + answers


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("changes", "method", "why"),
    [
        (["lora=null"], "snapshot", "because the policy has no adapter"),
        (["lora.init=pissa"], "snapshot", "the adapter already holds something, or its base was rewritten"),
        (["lora.r=2"], "adapter_off", "all inside the adapter"),
        (["lora=null", "objective.loss=simpo", "objective.beta=2.0"], "none", "no reference is loaded or run"),
    ],
)
def test_the_reference_and_why(here, capsys, changes, method, why, without_step):
    found = planned(capsys, "run.yaml", *changes)["reference"]
    assert found["method"] == method
    assert why in found["why"]


def test_a_probe_measures_a_step_and_leaves_nothing(here, capsys):
    assert planned(capsys, "run.yaml")["seconds_per_step"] is None
    assert planned(capsys, "run.yaml", "--probe")["seconds_per_step"] > 0
    assert not (here.path / "out").exists()
    assert main(["plan", "run.yaml", "--probe", "--gpu", "8GiB"]) == 2
    assert "--probe measures this machine" in capsys.readouterr().err


def test_a_run_that_does_not_fit_is_told_what_to_set(here, capsys):
    assert main(["plan", "run.yaml", "lora=null", "--gpu", "0.1MiB"]) == 1
    assert "it does not fit" in capsys.readouterr().out
    small = planned(capsys, "run.yaml", "lora=null", "--gpu", "80GiB")
    assert small["fits"]
    assert small["change"] is None
    less = f"{0.9 * small['peak'] / 2**20}MiB"
    change = planned(capsys, "run.yaml", "lora=null", "--gpu", less, code=1)["change"]
    keys = [f"{name}={json.dumps(value)}" for name, value in change.items()]
    assert planned(capsys, "run.yaml", "lora=null", *keys, "--gpu", less)["fits"]
    halves = planned(capsys, "run.yaml", "lora=null", "--gpu", "80GiB", "--gpus", "2", "--fsdp")
    assert halves["memory"]["optimizer"] == small["memory"]["optimizer"] // 2


@pytest.mark.parametrize("arguments", [["--gpu", "big"], ["--gpus", "2"], ["--gpu", "8GiB", "--fsdp"]])
def test_options_that_mean_nothing_are_refused(here, capsys, arguments):
    assert main(["plan", "run.yaml", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


def test_no_weights_are_read(here, capsys, monkeypatch, without_step):
    (here.path / "model" / "model.safetensors").unlink()
    assert planned(capsys, "run.yaml")["model"]["parameters"] > 0


def test_init_writes_what_plan_accepts(here, capsys, without_step):
    assert main(["init", "own.yaml", "--yes"]) == 0
    text = Path("own.yaml").read_text(encoding="utf-8")
    assert "model: model" in text
    assert "train: pairs.jsonl" in text
    assert "loss: sigmoid" in text
    capsys.readouterr()
    assert planned(capsys, "own.yaml")["rows"]["rows"] < 24  # some are held out
    assert main(["init", "own.yaml", "--yes"]) == 2
    assert main(["init", "whole.yaml", "--yes", "--full", "--learn", "orpo", "--machine", "cpu"]) == 0
    capsys.readouterr()
    found = planned(capsys, "whole.yaml")
    assert found["model"]["parameters"] == found["model"]["trainable"]


@pytest.mark.parametrize(
    ("name", "content", "line", "loss"),
    [
        ("a.csv", "\ufeffprompt,completion,label\nA,b,1\n", "train: a.csv", "kto"),
        ("a.csv", "\n,,\nprompt,completion\nA,b\n", "train: a.csv", "sft"),
        ("a.ndjson", '\n{"conversations": []}\n', "train: a.ndjson", "sft"),
        (
            "a.csv",
            "Question,Good,Other\nA,b,c\n",
            "train: {path: a.csv, fields: {prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}}",
            "sigmoid",
        ),
    ],
)
def test_init_knows_rows_by_their_columns_or_asks_for_their_names(
    tmp_path, monkeypatch, capsys, name, content, line, loss
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content, encoding="utf-8")
    assert main(["init", "--data", name, "--yes"]) == 0
    text = Path("run.yaml").read_text(encoding="utf-8")
    assert line in text
    assert f"loss: {loss}" in text
    printed = capsys.readouterr().out
    assert ("write into `fields` of run.yaml which columns hold what; a.csv has Good, Other" in printed) == (
        "COLUMN" in line
    )


def test_init_without_rows_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--yes"]) == 2
    assert "--data FILE" in capsys.readouterr().err


def test_doctor_says_what_there_is(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in said
    assert "CPU: " in said
