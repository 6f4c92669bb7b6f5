"""What is said of a run file without torch is what the whole check says, word for word; and the keys are all there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tether.config import load_run_file
from tether.config.keys.page import known_keys
from tether.config.keys.unknown import KEYS, refuse_at_once
from tether.errors import ConfigError

GOOD = "model: m\ndata: {train: rows.jsonl}\n"
WRONG = [
    "model: m\ndata: {train: rows.jsonl}\ntrain: {learning_rat: 1e-5}\n",
    "model: m\ndata: {train: rows.jsonl}\nlora: {rank_: 4, r: 8}\n",
    "model: m\ndata: {train: rows.jsonl, evl: x.jsonl}\n",
    "model: m\ndata: {train: rows.jsonl}\nobjectiv: {beta: 0.1}\n",
    "model: m\ndata: {train: rows.jsonl}\nreference: {lora_alpha: 3}\n",
    "model: {name: m, torch_dtype: float32}\ndata: {train: rows.jsonl}\n",
    "model: m\ndata: {train: rows.jsonl}\nbeta: 0.1\n",
    "model: m\ndata: {train: rows.jsonl}\ntrain: {warmup_ratio: 0.1}\n",
    "model: m\ndata: {train: rows.jsonl}\ntrain: {max_prompt_length: 8}\n",
    "model: m\ndata: {train: rows.jsonl}\nobjective: {loss: kto}\ntrain: {zzz: 1}\n",
    "model: m\nmodel: n\n",
    "model: [m\n",
    "- model\n",
]


def _said(check, *arguments) -> str:
    with pytest.raises(ConfigError) as error:
        check(*arguments)
    return str(error.value)


@pytest.mark.parametrize("text", WRONG)
def test_it_says_what_the_whole_check_says(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    assert _said(refuse_at_once, file) == _said(load_run_file, file)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("warmup_ratio", "`train.warmup_ratio` is not known. It is called `train.warmup_steps` now."),
        ("evaluation_strategy", "It is called `train.eval_strategy` now."),
        ("max_seq_length", "It is called `train.max_length` now."),
        ("overwrite_output_dir", "It has no effect any more, and none is needed: leave it out."),
        ("max_prompt_length", "There is no such option any more: max_length is of prompt and completion together"),
        ("rpo_alpha", "Write `objective: {loss: [sigmoid, sft], weights: [1.0, …]}`"),
    ],
)
def test_a_retired_name_says_what_became_of_it(tmp_path, name, said):
    file = tmp_path / "run.yaml"
    file.write_text(f"{GOOD}train: {{{name}: 1}}\n", encoding="utf-8")
    assert said in _said(refuse_at_once, file)


@pytest.mark.parametrize("override", ["train.learning_rat=1", "lora.alhpa=3", "trian.epochs=1"])
def test_so_it_does_of_overrides(tmp_path, override):
    file = tmp_path / "run.yaml"
    file.write_text(GOOD, encoding="utf-8")
    assert _said(refuse_at_once, file, [override]) == _said(load_run_file, file, [override])


def test_a_loss_by_an_override_has_its_own_fields(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"{GOOD}train: {{max_completion_length: 8}}\n", encoding="utf-8")
    assert refuse_at_once(file, ["objective.loss=dapo"]) is None


def test_a_file_that_is_not_there(tmp_path):
    assert _said(refuse_at_once, tmp_path / "x.yaml") == _said(load_run_file, tmp_path / "x.yaml")


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml")), ids=lambda f: f.stem)
def test_the_examples_pass(file):
    assert refuse_at_once(file) is None


def test_the_keys_are_those_of_the_configurations():
    assert json.loads(KEYS.read_text(encoding="utf-8")) == known_keys()


def test_torch_is_not_imported_for_a_wrong_key(tmp_path):
    (tmp_path / "run.yaml").write_text(WRONG[0], encoding="utf-8")
    code = (
        "import sys; from tether.cli.main import main; "
        "codes = [main(['train', 'run.yaml']), main(['plan', 'none.yaml']), main(['precompute', 'run.yaml'])]; "
        "print(codes, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "[2, 2, 2] []"
    assert "Did you mean `train.learning_rate`?" in done.stderr
