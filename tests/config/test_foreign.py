"""Files of TRL, Axolotl and LLaMA-Factory become run files with exactly the values that the tool would train with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from tether.config import load_run_file
from tether.config.arguments import _unsharded
from tether.config.fields import config_class, fields_under
from tether.config.foreign import COMMANDS, TOOLS, Conversion, convert_file, detect, from_flags, is_foreign
from tether.config.foreign.document import parse_foreign
from tether.config.foreign.table import MARKS, Row, load_table, load_templates
from tether.config.foreign.write import fate_lines, run_file_text
from tether.config.run import RunConfig
from tether.errors import ConfigError
from tether.models.chat_template import LIBRARY

ROOT = Path(__file__).resolve().parents[2]
LOSSES: list[Any] = [["sigmoid"], "kto", "orpo", "cpo", "sft", "reward", "dapo", "rloo"]

AXOLOTL = """\
base_model: some/model
rl: dpo
rl_beta: 0.2
datasets:
  - path: pairs.jsonl
    type: chatml.intel
    split: train
    ds_type: json
val_set_size: 0.1
output_dir: ./out
adapter: lora
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 2
micro_batch_size: 3
num_epochs: 2
learning_rate: 5e-6
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
flash_attention: yes
sequence_len: 2048
wandb_project: demo
wandb_name: one
special_tokens: {pad_token: "<pad>"}
"""
LLAMAFACTORY = """\
model_name_or_path: some/model
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
pref_beta: 0.2
pref_loss: sigmoid
dataset: mine
dataset_dir: .
template: llama3
cutoff_len: 1_024
overwrite_cache: true
output_dir: saves/dpo
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
plot_loss: true
"""
TRL = """\
model_name_or_path: some/model
dataset_name: some/pairs
dataset_test_split: held_out
use_peft: true
lora_r: 8
lora_alpha: 16
learning_rate: 5.0e-6
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
eval_strategy: steps
eval_steps: 50
max_length: 512
beta: 0.2
loss_type: [sigmoid, bco_pair]
loss_weights: [1.0, 0.5]
"""
GRPO = """\
model_name_or_path: some/model
dataset_name: some/prompts
reward_funcs: [judges.brevity, think_format_reward]
reward_weights: [0.5, 1.0]
num_generations: 4
max_completion_length: 64
max_prompt_length: 128
beta: 0.04
loss_type: dr_grpo
learning_rate: 1e-6
"""


V1 = """\
model: some/model
model_class: llm
template: qwen3_nothink
peft_config: {name: lora, r: 16, lora_alpha: 32, lora_dropout: 0.05, target_modules: all}
kernel_config: {name: auto, include_kernels: auto}
dist_config: {name: fsdp2, dcp_path: null}
train_dataset: v1.yaml
output_dir: out
micro_batch_size: 2
global_batch_size: 8
cutoff_len: 1024
learning_rate: 1.0e-5
sample_backend: hf
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with LLaMA-Factory's list of data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    info = {
        "mine": {"file_name": "pairs.json", "ranking": True, "columns": {"prompt": "ask", "chosen": "chosen"}},
        "chats": {"hf_hub_url": "some/chats", "formatting": "sharegpt", "split": "test", "subset": "a"},
        "renamed": {"file_name": "x.json", "formatting": "sharegpt", "tags": {"user_tag": "bard"}},
        "odd": {"file_name": "x.json", "formatting": "sharegpt", "tags": {"writer_tag": "bard"}},
        "listed": {"file_name": "x.json", "columns": ["x"]},
        "slip": {"file_name": "x.json", "colums": {}},
        "number": 3,
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "v1.yaml").write_text("pairs: {path: some/pairs, split: train_prefs, converter: pair}\n")
    (tmp_path / "odd.yaml").write_text("odd: {path: a.json, num_samples: 5}\n")
    (tmp_path / "chats.yaml").write_text(
        "a: {path: a.json, source: local, converter: alpaca}\nb: {path: b.json, converter: sharegpt, size: 9}\n"
    )
    (tmp_path / "judges.py").write_text(
        "def brevity(completions, **_):\n    return [-len(one) for one in completions]\n"
    )
    return tmp_path


def converted(text: str, *overrides: str, command: str | None = None) -> Conversion:
    """What a file becomes."""
    Path("file.yaml").write_text(text, encoding="utf-8")
    return convert_file("file.yaml", overrides, command)


def problem(text: str, *overrides: str, command: str | None = None) -> str:
    """What is said of a file that is refused."""
    with pytest.raises(ConfigError) as caught:
        converted(text, *overrides, command=command)
    return str(caught.value)


def fate(conversion: Conversion, key: str) -> Any:
    """What became of a key."""
    return next(one for one in conversion.fates if one.key == key)


# The tables


def has_target(target: str) -> bool:
    """Whether the run file has a dotted key."""
    head, *rest = target.split(".")
    if head not in RunConfig.model_fields:
        return False
    kinds = [RunConfig.model_fields[head].annotation]
    for part in rest:
        if head in ("train", "objective"):
            known = {name for loss in LOSSES for name in fields_under(head, config_class(loss))}
            return part in known | RunConfig.model_fields[head].annotation.model_fields.keys()  # type: ignore[union-attr]
        inner = [
            kind for one in kinds for kind in (one, *getattr(one, "__args__", ())) if hasattr(kind, "model_fields")
        ]
        kinds = [kind.model_fields[part].annotation for kind in inner if part in kind.model_fields]  # type: ignore
        if not kinds:
            return False
    return True


def faults(row: Row, rules: Any) -> list[str]:
    """What is inconsistent about a row."""
    found = [f"{row.key}: no key {target}" for target in row.targets if not has_target(target)]
    if row.mark == "same" and (len(row.targets) != 1 or row.rule):
        found.append(f"{row.key}: the same thing has one target, and no rule")
    if row.mark == "convertible" and row.rule not in rules:
        found.append(f"{row.key}: no rule {row.rule!r}")
    if row.mark in ("note", "ask", "refused") and row.targets:
        found.append(f"{row.key}: {row.mark} sets nothing")
    if row.mark in ("note", "ask", "refused") and not row.reason:
        found.append(f"{row.key}: no reason")
    if row.default is not None and row.mark != "same":
        found.append(f"{row.key}: a default is of the same thing")
    return found


@pytest.mark.parametrize("name", TOOLS)
def test_every_mark_is_consistent_and_every_target_exists(name: str) -> None:
    tool = TOOLS[name]
    assert [fault for row in tool.rows().values() for fault in faults(row, tool.rules)] == []


def test_an_inconsistent_row_is_caught() -> None:
    rows = [
        Row("a", "same", "train.no_such_key"),
        Row("a", "same", "model.name reference.model"),
        Row("a", "convertible", "lora.r", "no_such_rule"),
        Row("a", "refused"),
        Row("a", "note", "lora.rank", reason="why"),
    ]
    assert [len(faults(row, {"model": None})) for row in rows] == [1, 1, 1, 1, 2]
    assert has_target("reference.sync.alpha")
    assert not has_target("reference.sync.beta")


def test_all_keys_of_axolotl_have_a_mark() -> None:
    top = [key for key in load_table("axolotl") if "[" not in key and "." not in key]
    # 390 of the schema of Axolotl 0.19, two that people write and it drops, five older names, 63 of plugins.
    assert len(top) == 460
    marks = {mark: sum(load_table("axolotl")[key].mark == mark for key in top) for mark in MARKS}
    assert min(marks.values()) > 0


def written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def table_of_stops(name: str) -> str:
    """Keys of a tool that stop a conversion, with what they may be and why, as docs/switching.md has them."""
    groups: dict[tuple[str, tuple[object, ...]], list[Row]] = {}
    for row in TOOLS[name].rows().values():
        if row.mark in ("ask", "refused"):
            groups.setdefault((row.reason, row.idle), []).append(row)
    lines = ["| key | may be | otherwise |", "|---|---|---|"]
    for (reason, idle), rows in groups.items():
        keys = ", ".join(f"`{row.key}`" for row in rows)
        may = ", ".join(f"`{written(value)}`" for value in idle) or "empty"
        lines.append(f"| {keys} | {may} | {'asked: ' if rows[0].mark == 'ask' else ''}{reason} |")
    return "\n".join(lines)


def test_pages_have_the_tables_of_what_is_refused() -> None:
    page = (ROOT / "docs" / "switching.md").read_text(encoding="utf-8")
    for name in TOOLS:
        assert table_of_stops(name) in page, f"docs/switching.md has another table of {name}"


USES = {
    "use": "written so, whatever the model's own is",
    "fallback": "written so where the model has no template",
    "own": "the model's own, which is that one; a model without one is refused",
    "refused": "refused",
}


def table_of_templates(tool: str) -> str:
    """What becomes of a tool's names of chat templates, as docs/switching.md has it."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, found in load_templates(tool).items():
        shown = f"`{name}`" if found.template in ("", name) else f"`{name}` (`{found.template}`)"
        groups.setdefault((found.use, found.reason), []).append(shown)
    rows = (f"| {', '.join(names)} | {USES[use]}{f': {why}' if why else ''} |" for (use, why), names in groups.items())
    return "\n".join(["| name (and ours) | becomes |", "|---|---|", *rows])


def test_templates_by_name_are_in_the_library_and_on_the_page() -> None:
    page = (ROOT / "docs" / "switching.md").read_text(encoding="utf-8")
    for tool, count in (("axolotl", 36), ("llamafactory", 125)):
        found = load_templates(tool)
        assert len(found) == count
        assert {one.template for one in found.values() if one.use in ("use", "fallback")} <= set(LIBRARY)
        assert all(bool(one.template) == (one.use in ("use", "fallback")) for one in found.values())
        assert table_of_templates(tool) in page, f"docs/switching.md has another table of {tool}'s templates"


# Whole files, with exact values


def test_an_axolotl_file_has_its_values_and_axolotls_defaults() -> None:
    found = converted(AXOLOTL)
    assert found.values == {
        "model": {"name": "some/model", "chat_template": "fallback:chatml"},
        "lora": {"r": 8, "alpha": 16, "target": "all-linear"},
        "data": {"train": {"path": "pairs.jsonl", "format": "chatml.intel"}, "eval": {"split": 0.1}},
        "objective": {"loss": "sigmoid", "beta": 0.2},
        "train": {
            "epochs": 2,
            "learning_rate": 5e-6,
            "max_length": 2048,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
            "truncation_mode": "drop",
            "warmup_steps": 0.1,
            "optim": "adamw_torch_fused",
            "lr_scheduler_type": "cosine",
            "eval_strategy": "steps",
            "eval_steps": 1 / 8,
            "eval_on_start": True,
            "save_strategy": "steps",
            "save_steps": 0.5,
            "save_total_limit": 4,
            "logging_first_step": True,
            "report_to": ["wandb"],
            "run_name": "one",
        },
        "env": {"WANDB_PROJECT": "demo"},
        "output": "./out",
    }
    marks = {one.key: one.mark for one in found.fates}
    assert (marks["base_model"], marks["rl"], marks["lora_dropout"]) == ("same", "convertible", "note")
    assert fate(found, "datasets[0].ds_type").there == "drops it under rl: dpo"


def test_a_llamafactory_file_has_its_values_and_transformers_defaults() -> None:
    found = converted(LLAMAFACTORY)
    assert found.values == {
        "model": {"name": "some/model", "chat_template": "fallback:llama3"},
        "lora": {"r": 8, "alpha": 16, "target": ["q_proj", "v_proj"]},
        "data": {"train": {"path": "pairs.json", "format": "alpaca", "fields": {"instruction": "ask"}}},
        "objective": {"loss": "sigmoid", "beta": 0.2},
        "train": {
            "epochs": 3.0,
            "learning_rate": 5e-6,
            "max_length": 1024,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
        },
        "output": "saves/dpo",
    }
    # What the file leaves out is LLaMA-Factory's, not ours.
    bare = converted("model_name_or_path: m\nstage: dpo\ndataset: mine\ndataset_dir: .\n")
    assert bare.run.train.learning_rate == 5e-5
    assert bare.run.train.max_length == 2048
    assert bare.run.train.further["per_device_train_batch_size"] == 8
    assert bare.values["lora"] == {"r": 8, "alpha": 16, "target": "all-linear"}


def test_a_trl_file_has_its_values_and_trls_defaults() -> None:
    found = converted(TRL)
    assert found.values == {
        "model": {"name": "some/model", "dtype": "float32"},
        "peft": {"type": "lora", "r": 8, "lora_alpha": 16},
        "data": {"train": "some/pairs", "eval": {"path": "some/pairs", "split": "held_out"}},
        "objective": {"loss": ["sigmoid", "bco_pair"], "weights": [1.0, 0.5], "beta": 0.2},
        "train": {
            "learning_rate": 5e-6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 50,
            "max_length": 512,
        },
        "output": "trainer_output",
    }
    assert fate(found, "loss_weights").mark == "same"


def test_a_file_of_grpo_has_its_rollouts_and_rewards() -> None:
    found = converted(GRPO, command="grpo")
    assert found.values["rewards"] == [{"python": "judges.py:brevity", "weight": 0.5}, {"name": "think_format"}]
    assert found.values["rollout"] == {"group": 4, "max_tokens": 64, "max_prompt": 128}
    assert found.values["objective"] == {"beta": 0.04, "loss": "dr_grpo", "scale_rewards": "group"}
    assert found.values["train"] == {
        "learning_rate": 1e-6,
        "disable_dropout": False,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
    }
    rloo = converted(GRPO.replace("loss_type: dr_grpo\n", ""), command="rloo")
    assert (rloo.run.objective.loss, rloo.run.objective.further["beta"]) == ("rloo", 0.04)


def test_vllm_of_a_file_of_trl_is_a_server_here() -> None:
    text = GRPO + "use_vllm: true\nvllm_server_port: 8123\nvllm_gpu_memory_utilization: 0.5\n"
    with pytest.raises(ConfigError, match=r"line 11: `use_vllm`: vLLM needs other .*tether\.rollout\.vllm_python="):
        converted(text, command="grpo")
    own = converted(text, "tether.rollout.vllm_python=/v/python", command="grpo")
    sampled = {"group": 4, "max_tokens": 64, "max_prompt": 128}
    assert own.values["rollout"] == {**sampled, "engine": "vllm", "vllm_memory": 0.5, "vllm_python": "/v/python"}
    assert fate(own, "vllm_server_port").mark == "note"
    served = converted(text, "vllm_mode=server", command="grpo")
    assert served.values["rollout"] == {**sampled, "engine": "vllm", "vllm_port": 8123, "vllm_mode": "server"}
    without = converted(text, "use_vllm=false", command="grpo")
    assert without.values["rollout"] == sampled
    assert fate(without, "vllm_server_port").there == "has no effect: use_vllm is not set"


def test_generation_kwargs_of_a_file_of_trl_are_keys_of_rollout() -> None:
    found = converted(GRPO + "generation_kwargs: {top_p: 0.9, repetition_penalty: 1.2}\n", command="grpo")
    assert (found.values["rollout"]["top_p"], found.values["rollout"]["repetition_penalty"]) == (0.9, 1.2)
    with pytest.raises(ConfigError, match="`num_beams` would change what is sampled unseen"):
        converted(GRPO + "generation_kwargs: {num_beams: 4}\n", command="grpo")


@pytest.mark.parametrize("text", [AXOLOTL, LLAMAFACTORY, TRL, GRPO], ids=["axolotl", "llamafactory", "trl", "grpo"])
def test_the_run_file_that_is_written_is_the_run_that_is_trained(text: str) -> None:
    found = converted(text, command="grpo" if text is GRPO else None)
    Path("run.yaml").write_text(run_file_text(found), encoding="utf-8")
    written = load_run_file("run.yaml")
    assert written.to_dict() == found.run.to_dict()
    assert written.reference.model_fields_set == found.run.reference.model_fields_set
    assert written.train.model_fields_set == found.run.train.model_fields_set


def test_comments_say_what_was_decided_and_the_table_what_became_of_every_key() -> None:
    found = converted(AXOLOTL + "strange: 1\n")
    text = run_file_text(found)
    assert "model:\n  name: some/model\n  # type: chatml.intel\n  chat_template: fallback:chatml\n" in text
    assert "env:\n  WANDB_PROJECT: demo\n" in text
    assert "  # Axolotl's default\n  optim: adamw_torch_fused\n" in text
    table = fate_lines(found)
    assert len(table) == 1 + len(found.fates) + len(found.defaults)
    assert all(any(line.strip().startswith(f"{one.key}:") for line in table) for one in found.fates)
    assert next(line for line in table if "strange" in line).endswith("no such key. Axolotl ignores it")


# What decides the numbers, one by one


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("rl: ipo", {"loss": "ipo", "beta": 0.1}),
        ("rl: kto\nkto_desirable_weight: 0.2\ntrl: {beta: 0.5}", {"loss": "kto", "beta": 0.5, "desirable_weight": 0.2}),
        ("rl: orpo\norpo_alpha: 0.3", {"loss": "orpo", "beta": 0.3}),
        ("rl: simpo\nrl_beta: 2", {"loss": "simpo", "beta": 2, "cpo_alpha": 1.0}),
        ("rl: simpo\ncpo_alpha: 0.5\nsimpo_gamma: 1.5", {"loss": "simpo", "cpo_alpha": 0.5, "simpo_gamma": 1.5}),
        ("rl: dpo\nrpo_alpha: 0.5", {"loss": ["sigmoid", "sft"], "weights": [1.0, 0.5], "beta": 0.1}),
        (
            "rl: dpo\ndpo_loss_type: [hinge, sft]\ndpo_loss_weights: [1, 2]",
            {"loss": ["hinge", "sft"], "weights": [1, 2]},
        ),
        (
            "reward_model: true\ncenter_rewards_coefficient: 0.01",
            {"loss": "reward", "center_rewards_coefficient": 0.01},
        ),
    ],
)
def test_axolotls_objectives(lines: str, expected: dict[str, Any]) -> None:
    base = "base_model: m\nlearning_rate: 1e-5\ndatasets: [{path: a.jsonl, type: chatml.intel}]\n"
    objective = converted(base + lines).run.objective
    shown = {"loss": objective.loss, **objective.further}
    assert {name: shown[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("pref_ftx: 0.5", {"loss": ["sigmoid", "sft"], "weights": [1.0, 0.5]}),
        ("pref_bco_weight: 1.0", {"loss": ["sigmoid", "bco_pair"], "weights": [0.5, 0.5]}),
        ("pref_loss: orpo\npref_beta: 0.2", {"loss": ["sft", "odds_ratio"], "weights": [1.0, 0.2]}),
        ("pref_loss: simpo", {"loss": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 0.1}),
        ("pref_loss: ipo\nld_alpha: 0.5", {"loss": "ipo", "ld_alpha": 0.5}),
        ("dpo_label_smoothing: 0.1", {"loss": "sigmoid", "label_smoothing": 0.1}),
    ],
)
def test_llamafactorys_preference_losses(lines: str, expected: dict[str, Any]) -> None:
    base = "model_name_or_path: m\nstage: dpo\ndataset: mine\ndataset_dir: .\n"
    objective = converted(base + lines).run.objective
    shown = {"loss": objective.loss, **objective.further}
    assert {name: shown[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("command", "lines", "expected"),
    [
        ("kto", "desirable_weight: 1.5", {"loss": "kto", "desirable_weight": 1.5}),
        ("sft", "loss_type: chunked_nll", {"loss": "sft"}),
        ("sft", "loss_type: dft\nassistant_only_loss: true", {"loss": "dft", "assistant_only_loss": True}),
        ("cpo", "loss_type: simpo", {"loss": "simpo", "cpo_alpha": 1.0}),
        ("orpo", "beta: 0.3", {"loss": "orpo", "beta": 0.3}),
        ("dpo", "loss_type: sft", {"loss": ["sft"]}),
        ("dpo", "rpo_alpha: 2", {"loss": ["sigmoid", "sft"], "weights": [1.0, 2]}),
        ("reward", "center_rewards_coefficient: 0.1", {"loss": "reward", "center_rewards_coefficient": 0.1}),
    ],
)
def test_trls_objectives(command: str, lines: str, expected: dict[str, Any]) -> None:
    found = converted(f"model_name_or_path: m\ndataset_name: a.jsonl\n{lines}\n", command=command)
    shown = {"loss": found.run.objective.loss, **found.run.objective.further}
    assert {name: shown[name] for name in expected} == expected
    defaults = config_class(COMMANDS[command]).__dataclass_fields__
    assert found.run.train.learning_rate == defaults["learning_rate"].default


def test_an_adapter_that_is_named_is_continued_and_the_reference_holds_it() -> None:
    axolotl = converted(AXOLOTL, "lora_model_dir=sft")
    assert axolotl.values["model"]["adapter"] == "sft"
    assert axolotl.values["reference"] == {"meaning": "start"}
    assert "lora" not in axolotl.values
    assert fate(axolotl, "lora_model_dir").there == "never loads it under rl: dpo, and starts from the base"
    theirs = converted(LLAMAFACTORY, "adapter_name_or_path=sft", "tether.reference=base")
    assert (theirs.run.model.adapter, theirs.run.reference.meaning) == ("sft", "base")
    stacked = converted(LLAMAFACTORY, "adapter_name_or_path=sft", "create_new_adapter=true")
    assert (stacked.run.model.adapter, stacked.run.reference.meaning) == ("sft", "start")
    assert stacked.values["lora"]["r"] == 8
    several = converted(LLAMAFACTORY, "adapter_name_or_path='a, b'", "adapter_folder=saves")
    assert (several.run.model.adapter, several.run.reference.meaning) == (["saves/a", "saves/b"], "start")
    assert "reference: {adapter: saves/a} gives that" in fate(several, "adapter_name_or_path").reason
    over = converted(LLAMAFACTORY, "adapter_name_or_path=a,b,c", "create_new_adapter=true")
    assert (over.run.model.adapter, over.values["lora"]["r"]) == (["a", "b", "c"], 8)
    assert "a, b, c: frozen beneath" in fate(over, "adapter_name_or_path").reason


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["bf16=true"], {"model.dtype": "bfloat16", "train.bf16": True}),
        (["bf16=false"], {"model.dtype": "float32", "train.bf16": False}),
        (["bf16=full"], {"model.dtype": "bfloat16", "train.bf16": False}),
        (["bf16=auto"], {"model.dtype": None, "train.bf16": None}),
        (["warmup_ratio=null"], {"train.warmup_steps": 0.03}),
        (["warmup_ratio=null", "max_steps=1000"], {"train.warmup_steps": 30}),
        (["warmup_ratio=null", "max_steps=9000"], {"train.warmup_steps": 100}),
        (["max_steps=55"], {"train.warmup_steps": 5}),
        (["max_steps=12"], {"train.warmup_steps": 2}),
        (["num_epochs=1", "evals_per_epoch=1"], {"train.eval_steps": None, "train.save_strategy": "epoch"}),
        (
            ["evals_per_epoch=null", "eval_strategy=epoch"],
            {"train.eval_strategy": "epoch", "train.eval_on_start": True, "train.eval_steps": None},
        ),
        (["optim_args={betas: 2}"], {"train.optim_args": "betas=2"}),
        (["cosine_min_lr_ratio=0.1"], {"train.lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
        (["batch_size=12", "gradient_accumulation_steps=null"], {"train.gradient_accumulation_steps": 4}),
        (["adapter=qlora"], {"model.quantization": "4bit", "lora.r": 8}),
        (["lora_target_linear=null"], {"lora": None, "peft": {"type": "lora", "r": 8, "lora_alpha": 16}}),
        (["hub_model_id=me/it"], {"train.push_to_hub": True, "train.hub_always_push": True}),
        (["rl_adapter_ref_model=true"], {"reference.model": "some/model"}),
        (["trl={sync_ref_model: true}"], {"reference.sync": {"alpha": 0.9, "steps": 64}}),
    ],
)
def test_what_axolotl_computes_from_its_keys(overrides: list[str], expected: dict[str, Any]) -> None:
    found = converted(AXOLOTL, *overrides)

    def at(target: str) -> Any:
        value: Any = found.values
        for part in target.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    assert {target: at(target) for target in expected} == expected


def test_a_template_of_a_file_is_taken() -> None:
    Path("mine.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    found = converted(AXOLOTL, "chat_template=jinja", "chat_template_jinja=mine.jinja")
    assert found.run.model.chat_template == "mine.jinja"
    assert converted(TRL, "chat_template_path=mine.jinja").run.model.chat_template == "mine.jinja"
    ours = converted(LLAMAFACTORY, "tether.model.chat_template=mine.jinja")
    assert ours.run.model.chat_template == "mine.jinja"


def test_older_names_are_taken_as_they_are_called_now() -> None:
    found = converted(TRL.replace("eval_strategy", "evaluation_strategy"), "max_seq_length=null", "fp16_backend=auto")
    assert found.values["train"]["eval_strategy"] == "steps"
    assert fate(found, "evaluation_strategy").reason == "it is called eval_strategy now"
    assert (fate(found, "max_seq_length").mark, fate(found, "fp16_backend").mark) == ("note", "note")


def test_rows_are_found_where_the_tool_finds_them() -> None:
    entry = (
        "{path: json, data_files: [a.jsonl, b.jsonl], type: chat_template, field_messages: talk, field_chosen: yes_}"
    )
    base = "base_model: m\nrl: dpo\nlearning_rate: 1e-5\n"
    assert converted(f"{base}datasets: [{entry}]").values["data"]["train"] == {
        "path": ["a.jsonl", "b.jsonl"],
        "format": "chat_template.default",
        "fields": {"messages": "talk", "chosen": "yes_"},
    }
    own = "{path: a.csv, type: {field_prompt: q, field_chosen: good, prompt_format: 'Q: {prompt}'}}"
    hub = "{path: some/rows, name: en, revision: v1, split: test, type: bradley_terry.chat_template}"
    assert converted(f"{base}datasets: [{own}, {hub}]").values["data"]["train"] == [
        {
            "path": "a.csv",
            "format": "user_defined",
            "fields": {"prompt": "q", "chosen": "good"},
            "prompt_format": "Q: {prompt}",
        },
        {"path": "some/rows", "name": "en", "revision": "v1", "split": "test", "format": "chatml.icr"},
    ]
    part = converted(base + "datasets: [{path: a.jsonl, type: chatml.intel, split: 'train[:100]'}]")
    assert part.values["data"]["train"] == {"path": "a.jsonl", "split": "train[:100]", "format": "chatml.intel"}
    fewer = converted(LLAMAFACTORY, "max_samples=50")
    assert fewer.values["data"]["train"]["first"] == 50
    chats = converted(LLAMAFACTORY, "dataset=mine,chats", "val_size=0.1")
    assert chats.values["data"]["train"][1] == {
        "path": "some/chats",
        "format": "sharegpt",
        "name": "a",
        "split": "test",
    }
    assert chats.values["data"]["eval"] == {"split": 0.1, "by": "row"}


BASE = "base_model: m\nlearning_rate: 1e-5\n"
SUPERVISED = [
    ("type: alpaca", {"format": "alpaca_text"}, "all"),
    ("type: chat_template", "rows", "assistant"),
    ("type: chat_template, field_messages: talk", {"fields": {"messages": "talk"}}, "assistant"),
    (
        "type: chat_template, field_messages: talk, message_property_mappings: {role: from, content: value}",
        {"format": "sharegpt", "fields": {"conversations": "talk"}},
        "assistant",
    ),
    (
        "type: {field_instruction: q, field_output: a, format: 'Q: {instruction}', system_prompt: 'Be {brief}. '}",
        {
            "format": "user_defined",
            "fields": {"instruction": "q", "completion": "a"},
            "prompt_format": "Be {{brief}}. Q: {instruction}",
        },
        "all",
    ),
    (
        "type: {field_input: more, field_system: sys, format: '{instruction} {input}'}",
        {
            "format": "user_defined",
            "fields": {"input": "more", "system": "sys", "completion": "output"},
            "prompt_format": "{system}{instruction} {input}",
        },
        "all",
    ),
]


@pytest.mark.parametrize(("entry", "expected", "turns"), SUPERVISED)
def test_axolotls_supervised_rows(entry: str, expected: Any, turns: str) -> None:
    found = converted(f"{BASE}datasets: [{{path: rows, {entry}}}]")
    rows = {"path": "rows", **expected} if isinstance(expected, dict) else expected
    assert found.values["data"]["train"] == rows
    assert found.values["train"].get("turns", "all") == turns
    if turns == "all":
        assert "a list" not in problem(f"{BASE}datasets: [{{path: r, {entry}}}, {{path: s, type: chat_template}}]")
        told = converted(f"{BASE}datasets: [{{path: rows, {entry}}}]", "default_system_message=Hi")
        assert ("system" in told.values["data"], fate(told, "default_system_message").mark) == (False, "note")


def test_axolotls_online_training_has_its_rollouts_rewards_and_transform() -> None:
    text = (
        f"{BASE}rl: gdpo\nsequence_len: 512\n"
        "trl: {reward_funcs: [judges.brevity, accuracy_reward], scale_rewards: true, "
        "reward_weights: [2, 1], num_generations: 4, max_completion_length: 64, beta: 0.1, use_vllm: false}\n"
        "datasets: [{path: rows, name: main, split: 'train[:10]', type: judges.brevity}]\n"
    )
    found = converted(text)
    assert found.values["rewards"] == [
        {"python": "judges.py:brevity", "weight": 2},
        {"python": "tether.trl.rewards:accuracy_reward"},
    ]
    assert found.values["rollout"] == {"group": 4, "max_tokens": 64}
    objective = found.values["objective"]
    assert objective == {"loss": "dapo", "multi_objective_aggregation": "normalize_then_sum", "beta": 0.1}
    rows = {"path": "rows", "name": "main", "split": "train[:10]", "transform": "judges.py:brevity"}
    assert found.values["data"]["train"] == rows
    assert "max_length" not in found.values["train"]
    assert fate(found, "sequence_len").mark == "note"
    grpo = converted(text.replace("gdpo", "grpo"), "max_prompt_len=128")
    assert (grpo.values["objective"]["scale_rewards"], grpo.values["rollout"]["max_prompt"]) == ("group", 128)


def test_recipes_of_the_alignment_handbook_are_read() -> None:
    text = TRL.replace("dataset_name: some/pairs\ndataset_test_split: held_out\n", "")
    mixed = "dataset_mixer: {a/b: 1.0, c/d: 0.25}\ndataset_splits: [train_prefs, test_prefs]\n"
    mixed += "preprocessing_num_workers: 2\n"
    found = converted(text + mixed + "use_flash_attention_2: true\nchat_template: '{{ messages }}'\n")
    assert found.values["data"] == {
        "train": [{"path": "a/b", "split": "train_prefs"}, {"path": "c/d", "split": "train_prefs[:25%]"}],
        "eval": [{"path": "a/b", "split": "test_prefs"}, {"path": "c/d", "split": "test_prefs"}],
    }
    assert (found.run.train.further["dataset_num_proc"], found.run.model.chat_template) == (2, "{{ messages }}")
    newer = (
        "dataset_mixture: {datasets: [{id: a/b, config: x, split: train_prefs, columns: [chosen], weight: 0.5}], "
        "test_split_size: 20, seed: 0}\n"
    )
    assert converted(text + newer).values["data"] == {
        "train": {"path": "a/b", "name": "x", "split": "train_prefs[:50%]", "columns": ["chosen"]},
        "eval": {"split": 20, "by": "row"},
    }


def test_what_the_examples_of_the_tools_say_by_the_way() -> None:
    """Each was found by a file of a tool's own examples that did not train."""
    idle = converted(TRL.replace("eval_strategy: steps\n", ""))
    assert ("eval_steps" in idle.values["train"], fate(idle, "eval_steps").mark) == (False, "note")
    assert fate(idle, "eval_steps").became == []
    assert converted(TRL, "env={TOKENIZERS_PARALLELISM: 'false'}").values["env"] == {"TOKENIZERS_PARALLELISM": "false"}
    assert fate(converted(GRPO, "use_vllm=false", command="grpo"), "use_vllm").mark == "note"
    unscaled = converted(GRPO, "scale_rewards=false", command="grpo")
    assert unscaled.values["objective"]["scale_rewards"] == "none"
    served = converted(GRPO, "use_vllm=true", "vllm_mode=server", command="grpo")
    assert served.values["rollout"]["engine"] == "vllm"
    assert fate(converted(AXOLOTL, "eval_table_max_new_tokens=128"), "eval_table_max_new_tokens").mark == "note"
    loaded = converted(TRL, "model_init_kwargs={device_map: auto, use_cache: false, dtype: bfloat16}")
    assert loaded.values["model"] == {"name": "some/model", "device": "auto", "dtype": "bfloat16"}
    beside = converted(AXOLOTL, "datasets.0.data_files=[pairs.jsonl]")
    assert beside.values["data"]["train"] == {"path": "pairs.jsonl", "format": "chatml.intel"}
    assert converted(AXOLOTL, "gradient_checkpointing=offload").values["train"]["gradient_checkpointing"] is True
    assert fate(converted(AXOLOTL, "eot_tokens=[<e>]"), "eot_tokens").mark == "note"
    fast, exact = (converted(LLAMAFACTORY, "pissa_init=true", *more) for more in ([], ["pissa_iter=-1"]))
    assert (fast.values["lora"]["init"], exact.values["lora"]["init"]) == ("pissa_niter_16", "pissa")


def test_a_file_says_how_many_processes_there_are() -> None:
    assert converted(TRL).processes == 1
    found = converted(TRL, "num_processes=4")
    assert (found.processes, fate(found, "num_processes").became) == (4, ["--launch 4"])
    assert converted(AXOLOTL).processes == 1


def test_a_configuration_of_accelerate_is_read_by_name_and_as_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    filled = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    auto = dict.fromkeys(filled, "auto")
    zero = converted(TRL, "accelerate_config=zero3")
    wanted = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    assert zero.values["train"]["deepspeed"] == {"zero_optimization": wanted, **auto}
    assert zero.processes == 4
    assert fate(zero, "accelerate_config").became == ["train.deepspeed", "--launch 4"]
    shared = converted(TRL, "accelerate_config=fsdp2", "num_processes=2")
    assert (shared.values["train"]["fsdp"], shared.processes) == (True, 2)
    assert converted(TRL, "accelerate_config=multi_gpu").processes == 4
    alone = converted(TRL, "accelerate_config=single_gpu")
    assert (alone.processes, {"fsdp", "deepspeed"} & alone.values["train"].keys()) == (1, set())
    lines = ["distributed_type: FSDP", "num_processes: 3", "fsdp_config: {fsdp_offload_params: true}", "use_cpu: true"]
    Path("own.yaml").write_text("\n".join(lines))
    own = converted(TRL, "accelerate_config=own.yaml")
    assert (own.processes, own.values["train"]["use_cpu"]) == (3, True)
    assert own.values["train"]["fsdp_config"] == {"fsdp_offload_params": True}
    Path("own.yaml").write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}")
    assert converted(TRL, "accelerate_config=own.yaml").values["train"]["deepspeed"] == "ds.json"
    assert "`accelerate_config` is 'zero4' (text); allowed is single_gpu, multi_gpu, zero1" in problem(
        TRL, "accelerate_config=zero4"
    )
    Path("own.yaml").write_text("distributed_type: TPU\nnum_machines: 2")
    assert "is for 2 machines" in problem(TRL, "accelerate_config=own.yaml")


def test_one_process_holds_the_whole_model_and_several_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is converted on one process is right for several."""
    found = converted(AXOLOTL, "fsdp=[full_shard, auto_wrap, offload]", "fsdp_version=2", "val_set_size=0")
    assert found.values["train"]["fsdp"] is True
    assert found.values["train"]["fsdp_config"] == {"offload_params": True, "version": 2}
    assert "--launch N" in fate(found, "fsdp").reason
    alone = fate(converted(AXOLOTL, "fsdp_version=2"), "fsdp_version")
    assert (alone.mark, alone.reason) == ("note", "of fsdp, which is not asked for")
    zero = {"deepspeed": {"zero_optimization": {"stage": 3}}, "fsdp": True, "seed": 1}
    assert _unsharded(zero) == {"seed": 1}
    moved = {"deepspeed": {"zero_optimization": {"offload_param": {"device": "cpu"}}}}
    assert _unsharded(moved) == moved
    Path("moved.json").write_text(json.dumps(moved["deepspeed"]))
    assert _unsharded({"deepspeed": "moved.json"}) == {"deepspeed": "moved.json"}
    with pytest.raises(ConfigError, match=r"`train.deepspeed` is 'no.json', which cannot be read"):
        _unsharded({"deepspeed": "no.json"})


def test_llamafactory_trains_some_layers_and_leaves_the_tower_alone() -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2}
    LlamaConfig(**small).save_pretrained("text")
    llava = {"text_config": LlamaConfig(**small), "vision_config": CLIPVisionConfig(**small)}
    LlavaConfig(**llava).save_pretrained("sees")
    frozen = ["model_name_or_path=text", "finetuning_type=freeze"]
    assert converted(LLAMAFACTORY, *frozen).values["model"]["train"] == [r"\.10\.", r"\.11\."]
    first = [*frozen, "freeze_trainable_layers=-1", "freeze_trainable_modules=mlp", "freeze_extra_modules=norm"]
    found = converted(LLAMAFACTORY, *first)
    assert found.values["model"]["train"] == [r"\.0\.mlp", "norm"]
    assert "1 of the 12 layers" in fate(found, "freeze_trainable_layers").reason
    assert {"lora", "peft"} & found.values.keys() == set()
    tower, bridge = (
        r"vision_tower|vision_model|vision_encoder|visual\.(?!merger)",
        "|multi_modal_projector|mm_projector",
    )
    full = converted(LLAMAFACTORY, "model_name_or_path=sees", "finetuning_type=full")
    [pattern] = full.values["model"]["freeze"]
    assert pattern.startswith(tower + bridge)
    lora = converted(LLAMAFACTORY, "model_name_or_path=sees", "freeze_multi_modal_projector=false")
    assert lora.values["peft"]["exclude_modules"] == f".*({tower}).*"
    assert (
        fate(converted(LLAMAFACTORY, "model_name_or_path=text", "freeze_vision_tower=true"), "freeze_vision_tower").mark
        == "note"
    )


GAPS = [
    ("chat_template: chatml", {"model.chat_template": "chatml"}),
    ("chat_template: mistral_v1", {"model.chat_template": "mistral_v1"}),
    ("chat_template: aya", {"model.chat_template": "cohere"}),
    ("chat_template: nemotron_h", {"model.chat_template": "chatml"}),
    ("chat_template: jamba", {"model.chat_template": "jamba"}),
    ("chat_template: tokenizer_default_fallback_llama3", {"model.chat_template": "fallback:llama3"}),
    ("special_tokens: {eos_token: <e>, pad_token: <p>}", {"model.special_tokens": {"eos_token": "<e>"}}),
    ("special_tokens: {additional_special_tokens: [<a>]}", {"model.add_tokens": ["<a>"]}),
    ("default_system_message: Be brief.", {"data.system": "Be brief."}),
    ("chat_template_kwargs: {enable_thinking: false}", {"data.chat_template_kwargs": {"enable_thinking": False}}),
    ("loraplus_lr_ratio: 16\nloraplus_lr_embedding: 1e-5", {"train.loraplus_lr_ratio": 16}),
    (
        "load_in_4bit: true\nbnb_config_kwargs: {bnb_4bit_quant_type: fp4, bnb_4bit_use_double_quant: false}",
        {"model.quantization": {"type": "fp4", "double": False}},
    ),
    ("dataset_exact_deduplication: true", {"data.deduplicate": True}),
    ("excess_length_strategy: raise", {"train.truncation_mode": "error"}),
    (
        "loss_watchdog_threshold: 5.0\nearly_stopping_patience: 2",
        {"callbacks": {"loss_watchdog": {"threshold": 5.0, "patience": 3}, "early_stopping": {"patience": 2}}},
    ),
]


@pytest.mark.parametrize(("lines", "expected"), GAPS)
def test_what_axolotl_says_of_templates_tokens_rows_and_ends(lines: str, expected: dict[str, Any]) -> None:
    text = AXOLOTL.replace('special_tokens: {pad_token: "<pad>"}\n', "") if "special_tokens" in lines else AXOLOTL
    found = converted(text + lines)
    for target, value in expected.items():
        section: Any = found.values
        for part in target.split("."):
            section = section[part]
        assert section == value
    Path("run.yaml").write_text(run_file_text(found), encoding="utf-8")
    assert load_run_file("run.yaml").to_dict() == found.run.to_dict()


def test_roles_and_keys_of_messages_are_renamed_where_they_are_not_found() -> None:
    found = converted(AXOLOTL, "datasets.0.roles={user: [bard], assistant: [gpt]}", "datasets.0.message_field_role=who")
    rows = found.values["data"]["train"]
    assert (rows["roles"], rows["message_keys"]) == ({"bard": "user"}, {"role": "who"})
    assert converted(LLAMAFACTORY, "dataset=renamed").values["data"]["train"]["roles"] == {"bard": "user"}
    assert converted(LLAMAFACTORY, "default_system=Hi").values["data"]["system"] == "Hi"


def test_weights_of_four_bits_are_those_of_the_tool() -> None:
    found = converted(TRL, "load_in_4bit=true")
    assert found.values["model"]["quantization"] == {"double": False}
    told = converted(TRL, "load_in_4bit=true", "use_bnb_nested_quant=true", "bnb_4bit_quant_type=fp4")
    assert told.values["model"]["quantization"] == {"type": "fp4"}
    assert converted(LLAMAFACTORY, "quantization_bit=4").values["model"]["quantization"] == "4bit"
    assert converted(LLAMAFACTORY, "loraplus_lr_ratio=8").run.train.further["loraplus_lr_ratio"] == 8
    of_set = converted(AXOLOTL, "datasets.0.chat_template=llama3")
    assert of_set.values["model"]["chat_template"] == "llama3"


def test_a_file_of_llamafactorys_v1_has_its_values_and_defaults() -> None:
    found = converted(V1)
    assert found.values == {
        "model": {"name": "some/model", "chat_template": "fallback:chatml"},
        "lora": {"r": 16, "alpha": 32, "target": "all-linear"},
        "data": {"train": {"path": "some/pairs", "split": "train_prefs"}},
        "objective": {"loss": "sigmoid"},
        "train": {
            "per_device_train_batch_size": 2,
            "max_length": 1024,
            "learning_rate": 1e-5,
            "epochs": 3,
            "logging_steps": 1,
            "dataloader_drop_last": True,
            "bf16": True,
            "gradient_accumulation_steps": 4,
            "save_strategy": "no",
            "optim": "adamw_torch",
            "weight_decay": 0.01,
            "lr_scheduler_type": "constant",
            "fsdp": True,
            "fsdp_config": {"version": 2},
        },
        "output": "out",
    }
    bare = converted("model: m\ntrain_dataset: rows.jsonl\n")
    assert (bare.run.objective.loss, bare.run.train.turns, bare.run.model.dtype) == ("sft", "assistant", "float32")
    assert (bare.run.train.learning_rate, bare.run.train.bf16) == (1e-4, False)
    orpo = converted(V1, "pref_loss=orpo", "pref_beta=0.2")
    assert (orpo.values["objective"]["loss"], orpo.values["objective"]["weights"]) == (
        ["sft", "odds_ratio"],
        [1.0, 0.2],
    )
    assert converted(V1, "model_class=cls").run.objective.loss == "reward"
    assert converted(V1, command="rm").run.objective.loss == "reward"
    chats = converted(V1, "train_dataset=chats.yaml")
    assert chats.values["data"]["train"] == [
        {"path": "a.json", "format": "alpaca"},
        {"path": "b.json", "format": "sharegpt", "first": 9},
    ]
    assert chats.values["lora"]["dropout"] == 0.05
    stored = converted(V1, "train_dataset=pairs.jsonl", command="dpo").values["data"]["train"]
    assert stored["fields"] == {"chosen": "chosen_messages", "rejected": "rejected_messages"}
    quantized = converted(V1, "quant_config={name: bnb, quantization_bit: 4, quantization_type: fp4}")
    assert quantized.values["model"]["quantization"] == {"type": "fp4", "double": True}
    own = converted(V1, "optim_config={name: adamw, lr: 2e-5, betas: [0.8, 0.9]}", "save_epochs=1").values["train"]
    assert (own["learning_rate"], own["adam_beta1"], own["weight_decay"], own["save_steps"]) == (2e-5, 0.8, 0.0, 1 / 3)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model=null", "`model` is missing. Name it."),
        ("model_class=null", "has pairs of answers, and does not say whether `dpo` or `rm` is to train on them"),
        ("peft_config.rank=8", "`peft_config.rank` is not read; lora has r, lora_alpha"),
        ("peft_config.name=loha", "`peft_config.name` is 'loha' (text); allowed is lora, freeze"),
        ("peft_config.export_dir=merged", "`peft_config.export_dir` is of a file that trains nothing. To write"),
        ("quant_config={name: gptq}", "`quant_config.name` is 'gptq' (text); allowed is bnb, auto"),
        ("dist_config.cp_size=2", "`dist_config.cp_size` is 2; sequences are not spread over devices. Set it to 1"),
        ("optim_config={name: muon}", "`optim_config.name` is 'muon' (text); allowed is adamw"),
        ("lr_scheduler_config={name: cosine}", "Take it out, and say tether.train.lr_scheduler_type=cosine"),
        ("global_batch_size=5", "`global_batch_size` is 5, and `micro_batch_size` 2 does not divide it"),
        ("train_dataset=nowhere.yaml", "`train_dataset` is 'nowhere.yaml', which is not a file here"),
        ("train_dataset=odd.yaml", "the data set 'odd' of odd.yaml has `num_samples`; known are path, source"),
        ("lr_scheduler_type=cosine", "`lr_scheduler_type` is not a key of LLaMA-Factory. Did you mean"),
    ],
)
def test_what_a_file_of_llamafactorys_v1_cannot_have(override: str, said: str) -> None:
    assert said in problem(V1, override)


def test_a_command_is_of_a_tool_that_has_commands() -> None:
    assert "--as was given, and file.yaml is a file of Axolotl" in problem(AXOLOTL, command="dpo")
    assert "--as is 'kto', and file.yaml is a file of LLaMA-Factory's v1; allowed are sft, dpo, rm" in problem(
        V1, command="kto"
    )


def test_losses_of_cpo_that_are_dpos_without_a_reference() -> None:
    text = "model_name_or_path: m\ndataset_name: d.jsonl\nloss_type: ipo\nbeta: 0.2\n"
    found = converted(text + "cpo_alpha: 0.5\nsimpo_gamma: 1.0\n", command="cpo")
    assert found.values["objective"] == {"loss": ["ipo", "sft"], "weights": [1.0, 0.5], "beta": 0.2}
    assert found.run.reference.meaning == "none"
    assert fate(found, "cpo_alpha").became == ["objective.weights"]
    assert converted(text, command="cpo").values["objective"]["weights"] == [1.0, 1.0]
    assert converted(text, "cpo_alpha=0", command="cpo").values["objective"] == {"loss": "ipo", "beta": 0.2}


def test_one_json_list_is_read_whole_though_it_is_to_be_streamed() -> None:
    Path("pairs.json").write_text('[{"a": 1}]')
    found = converted(LLAMAFACTORY, "streaming=true", "max_steps=5")
    assert "streaming" not in found.values["data"]
    assert "one JSON list, which is read whole" in fate(found, "streaming").reason
    Path("pairs.json").write_text('{"a": 1}\n')
    assert converted(LLAMAFACTORY, "streaming=true", "max_steps=5").values["data"]["streaming"] is True


# Reading


def test_values_are_read_as_the_tools_read_them() -> None:
    text = "a: 5e-6\nb: 500_000\nc: yes\nd: off\ne: 2020-01-01\nf: 1_0.5\ng: '5e-6'\nh: 1e3x\n"
    values = {"a": 5e-6, "b": 500000, "c": True, "d": False, "e": "2020-01-01", "f": 10.5, "g": "5e-6", "h": "1e3x"}
    assert parse_foreign(text, "x") == values
    assert converted(AXOLOTL, "learning_rate='1e-4'", "eval_batch_size='4'").run.train.learning_rate == 1e-4


def test_the_last_of_two_keys_counts_and_is_said_except_where_the_tool_stops() -> None:
    found = converted(AXOLOTL + "learning_rate: 1e-4\n")
    assert found.run.train.learning_rate == 1e-4
    assert "given twice; the last one counts, not line 19" in fate(found, "learning_rate").reason
    assert "line 22: `learning_rate` was given before, on line 17" in problem(LLAMAFACTORY + "learning_rate: 1e-4\n")


def test_the_tool_is_told_by_its_keys() -> None:
    assert detect({"base_model": "m"}) == "axolotl"
    assert detect({"model_name_or_path": "m", "stage": "dpo"}) == "llamafactory"
    assert detect({"model_name_or_path": "m", "finetuning_type": "full"}) == "llamafactory"
    assert detect({"model_name_or_path": "m"}) == "trl"
    assert detect({"model": "m", "data": {}}) is None
    assert (
        detect({"model": "m", "train_dataset": "x"}) == detect({"model": None, "peft_config": {}}) == "llamafactory_v1"
    )
    assert detect({"model": {"name": "m"}, "data": {}}) is None
    Path("ours.yaml").write_text("model: m\ndata: {train: a.jsonl}\n")
    Path("trl.yaml").write_text(TRL)
    assert [is_foreign(Path(name)) for name in ("ours.yaml", "trl.yaml", "none.yaml")] == [False, True, False]


def test_trls_command_is_guessed_where_only_one_fits() -> None:
    assert converted(TRL).run.objective.loss == ["sigmoid", "bco_pair"]
    assert converted("model_name_or_path: m\ndataset_name: d.jsonl\ndesirable_weight: 2\n").run.objective.loss == "kto"
    said = problem("model_name_or_path: m\ndataset_name: d.jsonl\nbeta: 0.1\n")
    assert "dpo, kto, orpo, cpo would fit" in said
    assert "`--as dpo`" in said


def test_flags_stand_over_the_file() -> None:
    Path("trl.yaml").write_text(TRL)
    found = from_flags("dpo", Path("trl.yaml"), {"beta": 0.3})
    assert found.run.objective.further["beta"] == 0.3
    single = {
        "lora_modules_to_save": "lm_head",
        "loss_weights": 0.5,
        "loss_type": "sigmoid",
        "lora_target_modules": "q",
    }
    one = from_flags("dpo", None, {"model_name_or_path": "m", "dataset_name": "d", "use_peft": True, **single}).values
    assert (one["lora"]["modules_to_save"], one["lora"]["target"]) == (["lm_head"], ["q"])
    assert one["objective"]["weights"] == [0.5]
    bare = from_flags("kto", None, {"model_name_or_path": "m", "dataset_name": "d.jsonl", "max_steps": 3})
    assert (bare.run.objective.loss, bare.run.train.max_steps, bare.run.output) == ("kto", 3, "trainer_output")
    with pytest.raises(ConfigError, match=r"argument '--betta': `betta` is not a key of TRL. Did you mean `beta`\?"):
        from_flags("dpo", Path("trl.yaml"), {"betta": 0.3})


def test_a_key_of_ours_can_be_said_in_their_file() -> None:
    found = converted(TRL + "tether: {data: {check: {identical: 0.01}}}\n", "tether.reference.model=other")
    assert found.run.data.check == {"identical": 0.01}
    assert found.values["data"]["train"] == "some/pairs"
    assert (found.run.reference.meaning, found.run.reference.model) == ("model", "other")
    assert "file.yaml, line 16, `tether.data.chek`: `data.chek` is not known" in problem(
        TRL + "tether: {data: {chek: 1}}\n"
    )


def test_overrides_are_in_the_files_own_words() -> None:
    found = converted(AXOLOTL, "datasets.0.path=other.jsonl", "lora_r=4", "trl.beta=0.7", "val_set_size=0")
    assert found.values["data"] == {"train": {"path": "other.jsonl", "format": "chatml.intel"}}
    assert (found.values["lora"]["r"], found.values["objective"]["beta"]) == (4, 0.7)
    assert "eval_steps" not in found.values["train"]
    assert "argument 'lora_r=many': `lora.r` is 'many'" in problem(AXOLOTL, "lora_r=many").replace(", `lora_r`:", ":")
    assert "nothing there has keys" in problem(AXOLOTL, "rl.beta=1")


def test_an_unknown_key_shows_no_secret() -> None:
    found = converted(AXOLOTL + "hub_token: hf_abc\nenv: {HF_TOKEN: hf_abc, A: b}\n")
    assert not [line for line in fate_lines(found) if "hf_abc" in line]
    assert fate(found, "env").value == {"HF_TOKEN": "[hidden]", "A": "b"}


# Wrong input


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (AXOLOTL, ["learning_rate=fast"], "`train.learning_rate` is 'fast' (text); allowed is a number"),
        (AXOLOTL, ["learning_rate=null"], "`learning_rate` is missing"),
        (AXOLOTL, ["lora_rr=8"], "Axolotl has no key `lora_rr` and ignores it. Did you mean `lora_r`?"),
        (AXOLOTL, ["ref_model=other"], "Axolotl has no such key and compares with the model as it starts"),
        (AXOLOTL, ["rl=grpo"], "`trl.reward_funcs` is empty (null); allowed is a list of functions"),
        (AXOLOTL, ["rl=grpo", "trl={reward_funcs: [judges.brevity], lora: 1}"], "`trl.lora` has no counterpart here"),
        (AXOLOTL, ["rl=dop"], "`rl` is 'dop' (text); allowed is dpo, ipo, kto, orpo, simpo, grpo, gdpo"),
        (AXOLOTL, ["optimizer=muon"], "`optimizer` is 'muon' (text); allowed is adamw_torch"),
        (AXOLOTL, ["lr_scheduler=rex"], "`lr_scheduler` is 'rex'"),
        (AXOLOTL, ["relora=true"], "no restarts of an adapter (ReLoRA) here"),
        (AXOLOTL, ["chat_template=orca"], "say chat_template=jinja chat_template_jinja=FILE"),
        (AXOLOTL, ["special_tokens={end_token: '</s>'}"], "text, under one of bos_token"),
        (AXOLOTL, ["datasets.0.type=mine.transform"], "module.function of a Python file that lies beside this one"),
        (AXOLOTL, ["datasets.0.chat_template=llama3", "chat_template=chatml"], "one template writes all"),
        (AXOLOTL, ["rl=null", "datasets.0.type=sharegpt"], "known are chat_template, alpaca and completion"),
        (AXOLOTL, ["load_in_4bit=true", "bnb_config_kwargs={x: 1}"], "`x` is not read; known are bnb_4bit_quant_type"),
        (AXOLOTL, ["datasets.0.shards=4"], "a run file has no such key of a data set"),
        (AXOLOTL, ["plugins=[my.Plugin]"], "`plugins` has 'my.Plugin', which is code that is not run here"),
        (AXOLOTL, ["save_steps=10"], "`saves_per_epoch` and `save_steps` say the same thing"),
        (AXOLOTL, ["warmup_ratio=3"], "`warmup_ratio` is 3 (a whole number); allowed is a share from 0 to below 1"),
        (AXOLOTL, ["adapter=llama-adapter"], "`adapter` is 'llama-adapter' (text); allowed is lora, qlora"),
        (LLAMAFACTORY, ["stage=ppo"], "PPO is not here"),
        (LLAMAFACTORY, ["pref_loss=kto_pair"], "which TRL removed; `stage: kto` reads pairs too"),
        (LLAMAFACTORY, ["dataset=other"], "is not there; there are mine, chats, renamed, odd"),
        (LLAMAFACTORY, ["dataset=odd"], "has the tag `writer_tag: bard`; known are role_tag"),
        (LLAMAFACTORY, ["dataset_dir=nowhere"], "nowhere/dataset_info.json cannot be read"),
        (LLAMAFACTORY, ["max_samples=many"], "`max_samples` is 'many' (text); allowed is a number"),
        (LLAMAFACTORY, ["save_safetensors=false"], "weights are saved as safetensors"),
        (AXOLOTL, ["chat_template_jinja=none.jinja"], "is neither a template nor the name of a file"),
        (LLAMAFACTORY, ["quantization_bit=3"], "`quantization_bit` is 3 (a whole number); allowed is 4 or 8"),
        (LLAMAFACTORY, ["lora_rnk=3"], "`lora_rnk` is not a key of LLaMA-Factory. Did you mean `lora_rank`?"),
        (
            LLAMAFACTORY,
            ["finetuning_type=freeze"],
            "`finetuning_type`: only some layers are to train, which needs their number",
        ),
        (LLAMAFACTORY, ["lora_rank=0"], "`lora.r` is 0 (a whole number); allowed is a whole number from 1"),
        (AXOLOTL, ["micro_batch_size=0"], "`micro_batch_size` is 0 (a whole number); allowed is a whole number from 1"),
        (AXOLOTL, ["image_size=big"], "`data.images.size` is 'big' (text); allowed is a whole number from 1, [width"),
        (AXOLOTL, ["wandb_project=[a]"], "`wandb_project` is ['a'] (a list); allowed is text or a number"),
        (TRL, ["env={WANDB_API_KEY: x}"], "`env.WANDB_API_KEY` is a secret, and files are copied"),
        (TRL, ["bete=0.1"], "`bete` is not a key of TRL. Did you mean `beta`?"),
        (TRL, ["dtype=float32", "torch_dtype=bfloat16"], "`torch_dtype` and `dtype` are one thing, and differ"),
        (
            LLAMAFACTORY,
            ["freeze_vision_tower=true"],
            "`freeze_vision_tower`: whether the model sees images is not known",
        ),
        (TRL, ["use_pefft=true"], "`use_pefft` is not a key of TRL. Did you mean `use_peft`?"),
        (TRL, ["loss_type=[kto_pair]"], "`loss_type` is 'kto_pair' (text); allowed is sigmoid, sigmoid_norm, hinge"),
        (TRL, ["max_prompt_length=512"], "max_length is of prompt and completion together"),
        (TRL, ["num_processes=0"], "`num_processes` is 0 (a whole number); allowed is a whole number from 1"),
        (TRL, ["num_machines=2"], "start them with `torchrun --nnodes N"),
        (TRL, ["dataset_mixer={a/b: 0.333}"], "a share in whole per cent"),
        (TRL, ["dataset_mixture={datasets: []}"], "a list of mappings, each with an `id`"),
        (TRL, ["bnb_4bit_quant_type=fp8"], "allowed is nf4, fp4"),
        (TRL, ["env={HF_TOKEN: x}"], "set HF_TOKEN in the environment"),
        (TRL, ["dataset_name=null"], "`dataset_name` is missing"),
        (TRL, ["datasets=[{path: a, shards: 5}]"], "`shards` is no key of a data set of TRL; there are path, name"),
        (TRL, ["reward_funcs=[a]"], "`reward_funcs` is of grpo and rloo"),
        (GRPO, ["reward_funcs=[no_such_reward]"], "known are think_format_reward, get_soft_overlong_punishment, acc"),
        (GRPO, ["reward_funcs=[none.such]"], "module.function of a Python file that lies beside this one"),
        (GRPO, ["reward_weights=[1.0]"], "`reward_weights` is [1.0] (a list); allowed is a list of 2 numbers"),
        (GRPO, ["reward_funcs=null", "reward_weights=null"], "something must judge the completions"),
        (
            "model_name_or_path: m\nadapter_name_or_path: a\ntemplate: llama3\nexport_dir: out\nexport_size: 5\n",
            [],
            "`export_dir` is of a file that trains nothing. To write an adapter into its model: tether merge ADAPTER",
        ),
        ("model_name_or_path: m\ntemplate: qwen3\ninfer_backend: huggingface\n", [], "tether chat MODEL"),
        (
            "model_name_or_path: m\nstage: sft\ndo_predict: true\neval_dataset: a\npredict_with_generate: true\n",
            [],
            "`predict_with_generate` is of a file that trains nothing",
        ),
        ("model_name_or_path: m\ntask: mmlu_test\ntemplate: fewshot\nlang: en\n", [], "Its benchmarks are not here"),
        (LLAMAFACTORY, ["template=lama3"], "is no template of LLaMA-Factory 0.9. Did you mean 'llama3'?"),
        (LLAMAFACTORY, ["dataset=''"], "`dataset` is missing"),
        (
            LLAMAFACTORY,
            ["dataset=listed"],
            "'listed' of dataset_info.json has `columns`: ['x'] (a list); it must be a map",
        ),
        (LLAMAFACTORY, ["beta=0.5"], "`beta` is not a key of LLaMA-Factory"),
        (
            LLAMAFACTORY,
            ["dpo_ftx=0.5"],
            "`dpo_ftx` is 0.5 (a number with a fraction); it is called pref_ftx now; write that",
        ),
        (LLAMAFACTORY, ["dataset=slip"], "has `colums`, which LLaMA-Factory ignores. Did you mean `columns`?"),
        (LLAMAFACTORY, ["dataset=number"], "'number' of dataset_info.json is 3 (a whole number); it must be a mapping"),
        (AXOLOTL, ["datasets.0.roles=[user]"], "`datasets.0.roles` is ['user'] (a list); allowed is a mapping"),
        (
            AXOLOTL,
            ["datasets.0.roles={user: 2}"],
            "`datasets.0.roles.user` is 2 (a whole number); allowed is a list of n",
        ),
        (
            AXOLOTL,
            ["datasets.0.chat_template={a: b}"],
            "`datasets.0.chat_template` is {'a': 'b'} (a mapping); allowed is",
        ),
        (LLAMAFACTORY, ["model_name_or_path=null"], "`model_name_or_path` is missing. Name the model."),
        (LLAMAFACTORY, ["stage=[dpo]"], "`stage` is ['dpo'] (a list); allowed is dpo, kto, rm, sft"),
        (AXOLOTL, ["base_model=''"], "`base_model` is missing. Name the model."),
        (AXOLOTL, ["rl={a: 1}"], "`rl` is {'a': 1} (a mapping); allowed is dpo, ipo, kto"),
        (AXOLOTL, ["evals_per_epoch=.inf"], "`evals_per_epoch` is inf (a number with a fraction); allowed is a number"),
        (AXOLOTL, ["saves_per_epoch=-1"], "`saves_per_epoch` is -1 (a whole number); allowed is a number from 0"),
        (AXOLOTL, ["base_model=${MODEL}"], "`base_model` has `${MODEL}`, and variables are not filled in. Write the"),
        (TRL, ["dataset_name=${DATA}/x"], "give it after the file: dataset_name=…"),
        ("base_model: m\n3: x\n", [], "file.yaml, line 2: a key must be a name. Put it in quotes."),
        ("base_model: m\n---\nrl: dpo\n", [], "a second document begins. Keep one in the file."),
        ("base_model: !!python/name:os.x y\n", [], "the tag 'tag:yaml.org,2002:python/name:os.x' is not read"),
        (AXOLOTL, ["chat_template=command_a"], "which the tokenizer of Command A has; say chat_template=tokenizer_def"),
        ("base_model: m\n\tlearning_rate: 1\n", [], "there is a tab"),
        ("model: m\n", [], "is not a file of TRL, Axolotl or LLaMA-Factory"),
    ],
)
def test_what_cannot_be_done_stops_with_key_reason_and_way_out(text: str, overrides: list[str], said: str) -> None:
    message = problem(text, *overrides, command={TRL: "dpo", GRPO: "grpo"}.get(text))
    assert said in message
    assert "file.yaml" in message or "argument" in message


def test_sets_that_llamafactory_draws_from_by_turns_have_their_shares() -> None:
    two = LLAMAFACTORY.replace("dataset: mine", "dataset: mine,chats")
    found = converted(two, "mix_strategy=interleave_under", "interleave_probs='0.7,0.3'")
    assert [rows["fraction"] for rows in found.values["data"]["train"]] == [0.7, 0.3]
    even = converted(two, "mix_strategy=interleave_under", "max_samples=9")
    assert [(rows["fraction"], rows["first"]) for rows in even.values["data"]["train"]] == [(1, 9), (1, 9)]
    assert "allowed is 2 numbers above 0" in problem(two, "mix_strategy=interleave_under", "interleave_probs=[1, 0]")
    over = converted(two, "mix_strategy=interleave_over", "interleave_probs=[1, 2]").values["data"]["train"]
    assert [(rows["fraction"], rows["repeat"]) for rows in over] == [(1, True), (2, True)]
    once = converted(two, "mix_strategy=interleave_once")
    assert once.values["data"]["train"] == converted(two).values["data"]["train"]
    assert fate(once, "mix_strategy").reason == "every row once, in a random order"
    assert fate(converted(two, "interleave_probs=[1, 1]"), "interleave_probs").mark == "note"


def test_swanlab_is_reported_to_as_the_tools_do() -> None:
    told = ("swanlab_project=films", "swanlab_mode=local")
    ours = converted(LLAMAFACTORY, "use_swanlab=true", "report_to=wandb", "swanlab_run_name=one", *told)
    plugin = "plugins=[axolotl.integrations.swanlab.SwanLabPlugin]"
    theirs = converted(AXOLOTL, plugin, "swanlab_experiment_name=one", "wandb_project=null", *told)
    for found, services in ((ours, ["wandb", "swanlab"]), (theirs, ["swanlab"])):
        assert found.values["train"]["report_to"] == services
        assert found.values["train"]["run_name"] == "one"
        assert found.values["env"] == {"SWANLAB_PROJECT": "films", "SWANLAB_MODE": "local"}
    assert fate(converted(LLAMAFACTORY, *told), "swanlab_project").mark == "note"
    assert "set SWANLAB_API_KEY in the environment" in problem(LLAMAFACTORY, "swanlab_api_key=x")


def test_a_secret_is_neither_taken_nor_shown() -> None:
    for text, key in ((TRL, "hub_token"), (LLAMAFACTORY, "hf_hub_token"), (AXOLOTL, "comet_api_key")):
        for said in (problem(f"{text}{key}: private-value\n"), problem(text, f"{key}=private-value")):
            assert f"`{key}` is given; it is a secret" in said
            assert "private-value" not in said
    shown = fate_lines(converted(f"{LLAMAFACTORY}swanlab_lark_secret: private-value\n"))
    assert any("swanlab_lark_secret: [hidden]" in line for line in shown)
    assert "private-value" not in "".join(shown)


def test_the_line_of_a_wrong_value_is_named() -> None:
    wrong = AXOLOTL.replace("lora_r: 8", "lora_r: eight")
    assert problem(wrong).startswith(
        "file.yaml, line 12, `lora_r`: `lora.r` is 'eight' (text); allowed is a whole number"
    )
    assert problem(AXOLOTL + "relora: true\nuse_pose: true\n").count("file.yaml, line") == 2
