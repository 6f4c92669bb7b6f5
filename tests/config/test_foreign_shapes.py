"""Whole files in the shape of each tool's own examples, with the keys that people leave empty in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tether.config import load_run_file
from tether.config.foreign import TOOLS, convert_document, convert_file
from tether.config.foreign.document import Document
from tether.config.foreign.write import fate_lines, run_file_text
from tether.errors import ConfigError

# What most Axolotl files end with: keys that are there to be filled in.
TAIL = """
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
resume_from_checkpoint:
local_rank:
xformers_attention:
flash_attention: true
early_stopping_patience:
debug:
deepspeed:
fsdp:
fsdp_config:
logging_steps: 1
weight_decay: 0.0
train_on_inputs: false
group_by_length: false
strict: false
"""
STEPS = """
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
gradient_checkpointing: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
bf16: auto
tf32: false
"""
LORA = """
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_target_modules:
lora_fan_in_fan_out:
"""
AXOLOTL = {
    "conversations": f"""
base_model: some/llama
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
special_tokens: {{pad_token: "<|pad|>"}}
load_in_8bit: true
load_in_4bit: false
chat_template: tokenizer_default
rl: dpo
datasets:
  - path: some/pairs
    type: chat_template.default
    field_messages: conversation
    field_chosen: chosen
    field_rejected: rejected
    message_property_mappings: {{role: role, content: content}}
    roles: {{system: [system], user: [user, human], assistant: [assistant]}}
dataset_prepared_path:
val_set_size: 0.05
sequence_len: 4096
sample_packing: false
pad_to_sequence_len: true
{LORA}{STEPS}{TAIL}""",
    "unpaired": f"""
base_model: some/llama
load_in_4bit: true
rl: kto
rl_beta: 0.5
kto_desirable_weight: 0.2
datasets: [{{path: some/kto, type: llama3.ultra, split: train}}]
dataset_prepared_path: last_run
val_set_size: 0.0
remove_unused_columns: false
sequence_len: 2048
gradient_checkpointing_kwargs: {{use_reentrant: false}}
{LORA.replace("adapter: lora", "adapter: qlora")}{STEPS}{TAIL}""",
    "whole model": f"""
base_model: some/model
rl: simpo
rl_beta: 2.0
cpo_alpha: 0
simpo_gamma: 1.0
chat_template: tokenizer_default_fallback_chatml
datasets: [{{path: some/pairs, type: chat_template.argilla, chat_template: tokenizer_default}}]
plugins: [axolotl.integrations.liger.LigerPlugin]
liger_rope: true
liger_rms_norm: true
context_parallel_size: 1
excess_length_strategy: truncate
{STEPS.replace("bf16: auto", "bf16: true")}{TAIL}""",
    "ranking": f"""
base_model: some/model
model_type: AutoModelForSequenceClassification
num_labels: 1
reward_model: true
center_rewards_coefficient: 0.01
datasets: [{{path: some/pairs, type: bradley_terry.chat_template}}]
eval_strategy: no
{STEPS.replace("evals_per_epoch: 4", "")}{TAIL}""",
    "supervised": f"""
base_model: some/model
datasets: [{{path: some/talk, type: chat_template, field_messages: messages, roles_to_train: [assistant]}}]
sample_packing: true
eval_sample_packing: true
{LORA}{STEPS}{TAIL}""",
}
FACTORY = """
### model
model_name_or_path: some/model
trust_remote_code: true

### method
stage: {stage}
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
{method}

### dataset
dataset: demo
dataset_dir: .
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 2
dataloader_num_workers: 4

### output
output_dir: saves/demo
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
LLAMAFACTORY = {
    "dpo": FACTORY.format(stage="dpo", method="pref_beta: 0.1\npref_loss: sigmoid  # choices: [sigmoid, orpo, simpo]"),
    "kto": FACTORY.format(stage="kto", method="pref_beta: 0.1"),
    "rm": FACTORY.format(stage="rm", method=""),
    "sft": FACTORY.format(stage="sft", method=""),
}
TRL = {
    "sft": "model_name_or_path:\n  some/model\ndataset_name:\n  some/text\nreport_to:\n  none\nseed:\n  1\n",
    "dpo": """
model_name_or_path: some/model
model_revision: main
dtype: bfloat16
attn_implementation: flash_attention_2
load_in_4bit: true
use_bnb_nested_quant: true
use_peft: true
lora_r: 16
lora_alpha: 16
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
lora_task_type: CAUSAL_LM
dataset_name: some/pairs
dataset_config: default
dataset_train_split: train_prefs
dataset_test_split: test_prefs
beta: 0.01
eval_strategy: steps
eval_steps: 100
gradient_checkpointing_kwargs: {use_reentrant: false}
remove_unused_columns: false
warmup_ratio: 0.1
overwrite_output_dir: true
padding_free: true
""",
    "kto": "model_name_or_path: m\ndatasets: [{path: a/b, name: x}, {path: c/d}]\nundesirable_weight: 0.5\n",
    "reward": "model_name_or_path: m\ndataset_name: a/b\ncenter_rewards_coefficient: 0.01\neval_strategy: no\n",
}
FILES = [
    *((f"axolotl {name}", text, None) for name, text in AXOLOTL.items()),
    *((f"factory {name}", text, None) for name, text in LLAMAFACTORY.items()),
    *((f"trl {name}", text, name) for name, text in TRL.items()),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, with LLaMA-Factory's list of data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    demo = {"file_name": "demo.json", "ranking": True, "formatting": "sharegpt", "columns": columns}
    Path("dataset_info.json").write_text(json.dumps({"demo": demo}))


@pytest.mark.parametrize(("text", "command"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_every_key_has_a_fate_and_the_written_file_is_the_same_run(text: str, command: str | None) -> None:
    Path("file.yaml").write_text(text)
    found = convert_file("file.yaml", command=command)
    top = {fate.key for fate in found.fates if "[" not in fate.key}
    assert top == {line.split(":")[0] for line in text.splitlines() if line[:1].isalpha()}
    for fate in found.fates:
        assert fate.became or fate.reason or fate.value is None, fate
    assert all(fate.became == [] for fate in found.fates if fate.mark == "note")
    assert len(fate_lines(found)) >= 1 + len(found.fates)
    Path("run.yaml").write_text(run_file_text(found))
    assert load_run_file("run.yaml").to_dict() == found.run.to_dict()


def run_of(text: str, *overrides: str, command: str | None = None) -> Any:
    """The run of a file."""
    Path("file.yaml").write_text(text)
    return convert_file("file.yaml", overrides, command).run


def test_what_the_shapes_say() -> None:
    pairs = run_of(AXOLOTL["conversations"])
    assert (pairs.model.quantization, pairs.data.train.format) == ("8bit", "chat_template.default")
    assert pairs.data.train.fields == {"messages": "conversation"}
    assert pairs.train.further["eval_steps"] == 1 / 16
    kto = run_of(AXOLOTL["unpaired"])
    assert (kto.objective.loss, kto.data.cache, kto.model.quantization) == ("kto", "last_run", "4bit")
    assert "eval_steps" not in kto.train.further
    simpo = run_of(AXOLOTL["whole model"])
    assert (simpo.lora, simpo.model.dtype, simpo.train.further["truncation_mode"]) == (None, "bfloat16", "keep_start")
    assert simpo.objective.further["cpo_alpha"] == 0
    reward = run_of(AXOLOTL["ranking"])
    assert (reward.objective.loss, reward.data.train.format) == ("reward", "chatml.icr")
    sft = run_of(AXOLOTL["supervised"])
    assert (sft.lora.dropout, sft.train.further["turns"]) == (0.05, "assistant")
    factory = run_of(LLAMAFACTORY["sft"])
    assert (factory.data.train.format, factory.data.train.first) == ("sharegpt", 1000)
    assert run_of(LLAMAFACTORY["rm"]).objective.loss == "reward"
    trl = run_of(TRL["dpo"], command="dpo")
    assert trl.data.eval.model_dump(exclude_defaults=True) == {
        "path": "some/pairs",
        "name": "default",
        "split": "test_prefs",
    }
    assert (trl.model.attention, trl.model.dtype, trl.train.further["warmup_steps"]) == (None, "bfloat16", 0.1)
    kto = run_of(TRL["kto"])
    assert [rows if isinstance(rows, str) else rows.path for rows in kto.data.train] == ["a/b", "c/d"]
    assert run_of(TRL["reward"]).train.further["eval_strategy"] == "no"


def test_what_only_the_user_can_say_stops_with_what_to_type() -> None:
    base = AXOLOTL["conversations"].replace("tokenizer_default", "command_a")
    with pytest.raises(ConfigError, match="say chat_template=tokenizer_default"):
        run_of(base)
    run = run_of(base, "chat_template=tokenizer_default")
    assert run.to_dict() == run_of(AXOLOTL["conversations"]).to_dict()


# Values of every shape that a file can have; what a key does not take is refused with its name.
VALUES: list[Any] = [True, 2, 0.5, "x", ["x"], {"x": 1}]
BASES = {
    "axolotl": {
        "base_model": "m",
        "rl": "dpo",
        "learning_rate": 1e-5,
        "datasets": [{"path": "a.jsonl", "type": "chatml.intel"}],
        "adapter": "lora",
        "lora_r": 4,
        "val_set_size": 0.1,
    },
    "llamafactory": {"model_name_or_path": "m", "stage": "dpo", "dataset": "demo", "dataset_dir": "."},
    "llamafactory_v1": {"model": "m", "train_dataset": "a.jsonl", "model_class": "llm", "pref_beta": 0.2},
    "trl": {"model_name_or_path": "m", "dataset_name": "a.jsonl", "eval_strategy": "steps", "use_peft": True},
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", TOOLS)
def test_no_key_of_any_mark_is_dropped_silently(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key with values of every shape: it sets something, is a note with its reason, or stops by its name."""
    monkeypatch.setattr("tether.config.foreign.convert.check_run", lambda values, place: values)
    tool, dropped, outcomes = TOOLS[name], [], {"set": 0, "note": 0, "stopped": 0}
    for key in tool.rows():
        if "[" in key or "." in key:
            continue
        for value in VALUES:
            document = Document(Path("file.yaml"), {**json.loads(json.dumps(BASES[name])), key: value})
            try:
                found = convert_document(tool, document, {}, "dpo" if name == "trl" else None)
            except ConfigError as error:
                outcomes["stopped"] += 1
                dropped += [] if f"`{key}" in str(error) else [f"{key}: {value!r}: {error}"]
                continue
            fate = next(one for one in found.fates if one.key == key)
            outcomes["note" if fate.mark == "note" else "set"] += 1
            if not (fate.reason if fate.mark == "note" else fate.became):
                dropped.append(f"{key}: {value!r} is {fate.mark} and sets nothing")
    assert dropped == []
    assert min(outcomes.values()) > 20, outcomes


NESTED = {
    "axolotl": (
        "datasets.0.path",
        "datasets.0.roles",
        "datasets.0.message_property_mappings",
        "datasets.0.roles_to_train",
    ),
    "llamafactory": ("tether.data.train", "dataset"),
    "llamafactory_v1": ("peft_config.r", "peft_config.target_modules", "dist_config.cp_size"),
    "trl": ("datasets.0.path", "env.A", "model_init_kwargs.dtype"),
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("name", NESTED)
def test_a_nested_value_of_any_shape_is_taken_or_refused(name: str) -> None:
    """An error is a sentence with the place of the key, and never one of Python's."""
    said: list[str] = []
    Path("file.yaml").write_text(json.dumps(BASES[name]))
    for path in NESTED[name]:
        for value in (*VALUES, [], {}, None, [[1]], [{"x": None}]):
            try:
                convert_file(
                    "file.yaml", [f"{path}={json.dumps(value)}"], "dpo" if name in ("trl", "llamafactory_v1") else None
                )
            except ConfigError as error:
                said.append(str(error))
    assert len(said) > 10
    assert [one for one in said if not re.search(r"argument '|file\.yaml", one)] == []
