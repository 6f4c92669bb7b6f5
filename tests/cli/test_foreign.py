"""Files of TRL, Axolotl and LLaMA-Factory, trained as they are; `tether convert`; TRL's command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tether.cli.foreign.trl import COMMANDS, flags
from tether.config import load_run_file
from tether.config.foreign import COMMANDS as KNOWN
from tether.errors import ConfigError

Tether = Callable[..., tuple[int, str, str]]
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}"

AXOLOTL = """\
base_model: model
rl: dpo
rl_beta: 0.5
datasets:
  - path: rows.jsonl
    type: {field_prompt: ask, field_chosen: good, field_rejected: bad, prompt_format: "Q {prompt}"}
adapter: lora
lora_r: 4
lora_alpha: 8
lora_target_linear: yes
micro_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1e-2
max_steps: 3
sequence_len: 64
logging_steps: 1
bf16: false
flash_attention: true
output_dir: out
"""
LLAMAFACTORY = """\
model_name_or_path: model
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
pref_beta: 0.5
pref_loss: sigmoid
pref_ftx: 0.25
dataset: mine
dataset_dir: data
template: default
cutoff_len: 64
per_device_train_batch_size: 4
gradient_accumulation_steps: 1
learning_rate: 1.0e-2
lr_scheduler_type: constant
max_steps: 3
logging_steps: 1
output_dir: out
overwrite_output_dir: true
"""
TRL = """\
model_name_or_path: model
dataset_name: pairs.jsonl
use_peft: true
lora_r: 4
lora_target_modules: [q_proj, v_proj]
per_device_train_batch_size: 4
learning_rate: 1e-2
logging_steps: 1
max_length: 64
report_to: none
output_dir: out
"""


def losses(folder: Path) -> list[float]:
    """The loss of each step of a run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in lines if "loss" in entry]


def test_an_axolotl_file_trains(workplace: Any, tether: Tether) -> None:
    workplace.write_rows([{"ask": f"film {n}:", "good": " good", "bad": " bad"} for n in range(12)], "rows.jsonl")
    (workplace.path / "axolotl.yaml").write_text(AXOLOTL)
    code, out, err = tether("train", "axolotl.yaml", "lora_r=2")
    assert code == 0, err
    found = losses(workplace.path / "out")
    assert len(found) == 3
    assert found[0] == pytest.approx(0.6931, abs=1e-4)
    assert found[-1] < found[0]
    for said in (
        "Axolotl: axolotl.yaml, 19 keys:",
        "lora_r: 2",
        "train.save_total_limit: 4",
        "batch: 4 pairs per step",
    ):
        assert said in err
    run = load_run_file(workplace.path / "out" / "config.yaml")
    assert (run.objective.further["beta"], run.lora.r, run.train.further["warmup_steps"]) == (0.5, 2, 0)  # type: ignore
    # The converted file is the same run.
    code, out, err = tether("convert", "axolotl.yaml", "lora_r=2", "-o", "made.yaml")
    assert (code, out) == (0, "run file: made.yaml\n")
    assert load_run_file("made.yaml").to_dict() == run.to_dict()
    code, _, err = tether("convert", "axolotl.yaml", "-o", "made.yaml")
    assert code == 2
    assert "'made.yaml' is there already" in err


def test_a_llamafactory_file_trains(workplace: Any, tether: Tether) -> None:
    workplace.write_tokenizer(eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE)
    (workplace.path / "data").mkdir()
    rows = [{"ask": f"film {n}:", "yes": " good", "no": " bad"} for n in range(12)]
    (workplace.path / "data" / "rows.json").write_text(json.dumps(rows))
    columns = {"prompt": "ask", "chosen": "yes", "rejected": "no"}
    info = {"mine": {"file_name": "rows.json", "ranking": True, "columns": columns}}
    (workplace.path / "data" / "dataset_info.json").write_text(json.dumps(info))
    (workplace.path / "factory.yaml").write_text(LLAMAFACTORY)
    code, _, err = tether("train", "factory.yaml")
    assert code == 0, err
    found = losses(workplace.path / "out")
    assert len(found) == 3
    assert found[0] > 0.6931 + 0.25  # the likelihood of an untrained model is well above one nat a token
    assert found[-1] < found[0]
    run = load_run_file(workplace.path / "out" / "config.yaml")
    assert run.objective.loss == ["sigmoid", "sft"]
    assert run.objective.further["weights"] == [1.0, 0.25]
    assert "template: default" in err
    assert "a run is never written over" in err
    code, _, err = tether("train", "factory.yaml")
    assert code == 2
    assert "already holds a run" in err


def test_trls_command_line_trains(workplace: Any, tether: Tether) -> None:
    (workplace.path / "trl.yaml").write_text(TRL)
    code, _, err = tether("dpo", "--config", "trl.yaml", "--max_steps", "2", "--beta=0.5", "--no_bf16")
    assert code == 0, err
    found = losses(workplace.path / "out")
    assert len(found) == 2
    assert found[0] == pytest.approx(0.6931, abs=1e-4)
    run = load_run_file(workplace.path / "out" / "config.yaml")
    assert (run.objective.further["beta"], run.train.max_steps, run.model.dtype) == (0.5, 2, "float32")
    assert run.lora.target == ["q_proj", "v_proj"]  # type: ignore[union-attr]
    code, _, err = tether("train", "trl.yaml", "max_steps=1", "output_dir=again", "--as", "dpo")
    assert code == 0, err
    assert len(losses(workplace.path / "again")) == 1


def test_a_file_of_grpo_trains(workplace: Any, tether: Tether) -> None:
    workplace.write_rows([{"prompt": f"film {n}:"} for n in range(8)], "prompts.jsonl")
    judge = "def many_e(completions, **_):\n    return [one.count('e') for one in completions]\n"
    (workplace.path / "judges.py").write_text(judge)
    arguments = "--model_name_or_path model --dataset_name prompts.jsonl --reward_funcs judges.many_e --max_steps 2"
    more = "--num_generations 4 --max_completion_length 8 --logging_steps 1 --output_dir out --report_to none"
    code, _, err = tether("grpo", *arguments.split(), *more.split())
    assert code == 0, err
    lines = [json.loads(line) for line in (workplace.path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines if "loss" in entry] == [1, 2]
    run = load_run_file(workplace.path / "out" / "config.yaml")
    assert run.rewards[0].python == "judges.py:many_e"  # type: ignore[index]
    assert run.rollout is not None
    assert (run.objective.loss, run.rollout.group, run.rollout.max_tokens) == ("dapo", 4, 8)


def test_a_file_that_is_refused_loads_no_weights(workplace: Any, tether: Tether, no_weights: None) -> None:
    (workplace.path / "trl.yaml").write_text(TRL)
    (workplace.path / "axolotl.yaml").write_text(AXOLOTL)
    cases = (
        (["train", "trl.yaml"], "would fit"),
        (["dpo", "--config", "axolotl.yaml"], "is a file of Axolotl, and this is TRL's command"),
        (["dpo", "--config", "trl.yaml", "--betta", "1"], "argument '--betta': `betta` is not a key of TRL"),
        (["grpo", "--config", "trl.yaml"], "something must judge the completions"),
        (["kto"], "`model_name_or_path` is missing"),
        (["train", "axolotl.yaml", "relora=true"], "argument 'relora=true': `relora` is true (a switch); no restarts"),
        (["convert", "run.yaml"], "is not a file of TRL, Axolotl or LLaMA-Factory"),
        (["convert", "none.yaml"], "'none.yaml' does not exist"),
    )
    for arguments, said in cases:
        code, out, err = tether(*arguments)
        assert (code, out) == (2, ""), arguments
        assert said in err
    assert not (workplace.path / "out").exists()


def test_the_run_gets_its_environment_where_that_says_nothing_yet(
    workplace: Any, tether: Tether, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str | None] = {}

    def stop(*args: Any, **kwargs: Any) -> None:
        import os

        seen.update({name: os.environ.get(name) for name in ("WANDB_PROJECT", "WANDB_MODE")})
        raise ConfigError("stopped here")

    monkeypatch.setattr("tether.config.build", stop)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "gone")
    monkeypatch.delenv("WANDB_PROJECT")
    (workplace.path / "trl.yaml").write_text(TRL + "env: {WANDB_PROJECT: mine, WANDB_MODE: offline}\n")
    code, _, err = tether("dpo", "--config", "trl.yaml")
    monkeypatch.setenv("WANDB_PROJECT", "")  # so that it is taken back
    assert code == 2
    assert "env.WANDB_PROJECT, env.WANDB_MODE" in err
    assert seen == {"WANDB_PROJECT": "mine", "WANDB_MODE": "online"}


def test_flags_are_read_as_trl_reads_them() -> None:
    given = ["--learning-rate", "5e-6", "--max_steps", "-1", "--use_peft", "--no_remove_unused_columns", "--x=a: b"]
    found = {"learning_rate": 5e-6, "max_steps": -1, "use_peft": True, "remove_unused_columns": False, "x": "a: b"}
    assert flags(given) == found
    assert flags(["--loss_type", "a", "b", "--kw", '{"a": 1}']) == {"loss_type": ["a", "b"], "kw": {"a": 1}}
    with pytest.raises(ConfigError, match="stands before every flag"):
        flags(["beta", "1"])


def test_the_commands_are_trls() -> None:
    assert tuple(KNOWN) == COMMANDS
