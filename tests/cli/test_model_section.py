"""The sections `model:`, `lora:` and `peft:` from outside: what a run file says is what trains and is saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tether.models import load_policy

Tether = Callable[..., tuple[int, str, str]]
SHORT = ("train.max_steps=2", "data.eval=null", "train.learning_rate=1e-2", "train.gradient_checkpointing=false")


def losses_of(workplace: Any, folder: str = "out") -> list[float]:
    lines = (workplace.path / folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(10)[None] + 4).logits[:, -10:]  # after virtual tokens


LAYERS = "[q_proj, v_proj, down_proj]"
KINDS = {
    "dora": (f"lora={{r: 2, target: {LAYERS}, dora: true}}", "LORA", "adapter_off"),
    "rslora": (f"lora={{r: 2, target: {LAYERS}, rslora: true}}", "LORA", "adapter_off"),
    "pissa": (f"lora={{r: 2, target: {LAYERS}, init: pissa}}", "LORA", "snapshot"),
    "olora": (f"lora={{r: 2, target: {LAYERS}, init: olora}}", "LORA", "snapshot"),
    "modules_to_save": (f"lora={{r: 2, target: {LAYERS}, modules_to_save: [lm_head]}}", "LORA", "adapter_off"),
    "rank_pattern": (
        f"peft={{type: lora, r: 2, target_modules: {LAYERS}, rank_pattern: {{q_proj: 1}}}}",
        "LORA",
        "adapter_off",
    ),
    "vera": ("peft={type: vera, r: 2, target_modules: [q_proj, o_proj]}", "VERA", "adapter_off"),
    "ia3": (
        "peft={type: ia3, target_modules: [v_proj, down_proj], feedforward_modules: [down_proj]}",
        "IA3",
        "adapter_off",
    ),
    "prompt": ("peft={type: prompt, num_virtual_tokens: 3}", "PROMPT_TUNING", "snapshot"),
    "prefix": ("peft={type: prefix, num_virtual_tokens: 3}", "PREFIX_TUNING", "snapshot"),
}


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sweep(3)
def test_each_kind_of_adapter_trains_and_loads_in_plain_peft(kind: str, workplace: Any, tether: Tether) -> None:
    """INV-1, 5, 38."""
    section, written, method = KINDS[kind]
    if not section.startswith("lora="):
        section = f"lora=null {section}"
    head, _, tail = section.partition(" peft=")
    sections = [head, f"peft={tail}"] if tail else [section]
    code, _, err = tether("train", "run.yaml", *SHORT, *sections)
    assert code == 0, err
    assert f"reference: start, by {method}" in err
    first, second = losses_of(workplace)
    assert first == pytest.approx(0.6931, abs=1e-4)
    assert second != first
    assert json.loads((workplace.path / "out" / "adapter_config.json").read_text())["peft_type"] == written
    base = AutoModelForCausalLM.from_pretrained(workplace.path / "model")
    plain = logits_of(base)
    loaded = logits_of(PeftModel.from_pretrained(base, workplace.path / "out"))
    assert (loaded - plain).abs().max() > 1e-4
    torch.testing.assert_close(
        loaded, logits_of(load_policy(workplace.path / "out", dtype="float32")), rtol=0, atol=1e-5
    )


def test_an_adapter_is_continued_or_frozen_beneath_a_new_one(workplace: Any, tether: Tether) -> None:
    """And one that Tether trained asks what the reference is to be (INV-8)."""
    assert tether("train", "run.yaml", *SHORT, "output=first")[0] == 0
    named = "model={name: model, adapter: first}"
    code, _, err = tether("train", "run.yaml", *SHORT, named)
    assert code == 2
    assert "first was trained by Tether against the reference" in err

    code, _, err = tether("train", "run.yaml", *SHORT, named, "lora=null", "reference=start", "output=continued")
    assert code == 0, err
    assert "by snapshot" in err
    assert losses_of(workplace, "continued")[0] == pytest.approx(0.6931, abs=1e-4)
    before, after = (load_file(workplace.path / name / "adapter_model.safetensors") for name in ("first", "continued"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)

    code, _, err = tether("train", "run.yaml", *SHORT, named, "lora={r: 2}", "reference=start", "output=stacked")
    assert code == 0, err
    assert "adapter: a new one over first; only the new one trains" in err
    assert losses_of(workplace, "stacked")[0] == pytest.approx(0.6931, abs=1e-4)
    kept = load_file(workplace.path / "stacked" / "frozen" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], before[name]) for name in before)
    assert json.loads((workplace.path / "stacked" / "adapter_config.json").read_text())["r"] == 2
    both = logits_of(load_policy(workplace.path / "stacked", dtype="float32"))
    assert (both - logits_of(load_policy(workplace.path / "first", dtype="float32"))).abs().max() > 1e-4


def test_parts_of_the_model_train_and_tokens_are_added(workplace: Any, tether: Tether) -> None:
    base = load_file(workplace.path / "model" / "model.safetensors")
    parts = "model={name: model, train: ['layers.1.mlp', embed_tokens], freeze: [up_proj], add_tokens: [<x>, <y>]}"
    code, _, err = tether("train", "run.yaml", *SHORT, "lora=null", parts)
    assert code == 0, err
    assert "2 tokens added" in err
    saved = load_file(workplace.path / "out" / "model.safetensors")
    rows = len(base["model.embed_tokens.weight"])
    moved = {name for name, tensor in base.items() if not torch.equal(saved[name][: len(tensor)], tensor)}
    assert moved == {
        "model.embed_tokens.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert len(saved["model.embed_tokens.weight"]) == rows + 2
    assert AutoTokenizer.from_pretrained(workplace.path / "out").convert_tokens_to_ids(["<x>", "<y>"]) == [
        rows,
        rows + 1,
    ]
    code, _, err = tether("train", "run.yaml", *SHORT, "lora=null", "model={name: model, train: [nothing]}", "output=b")
    assert code == 2
    assert "No parameter has 'nothing' in its name" in err


def test_how_a_model_is_loaded_is_what_the_run_file_says(workplace: Any, tether: Tether) -> None:
    """dtype, attention, device, and a tokenizer of another folder."""
    AutoTokenizer.from_pretrained(workplace.path / "model").save_pretrained(workplace.path / "words")
    workplace.remove_tokenizer()
    options = "model={name: model, dtype: bfloat16, attention: eager, device: cpu, tokenizer: words}"
    code, _, err = tether("train", "run.yaml", *SHORT, options, "lora=null", "train.learning_rate=0.1")
    assert code == 0, err
    assert load_file(workplace.path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert (workplace.path / "out" / "tokenizer.json").is_file()


WRONG = {
    "device": ("model={name: model, device: cudda}", "device_map is 'cudda'"),
    "nowhere": ("model={name: model, device: meta}", "device_map is 'meta'"),
    "adapter": ("model={name: model, adapter: model}", "which is not a folder with adapter_config.json"),
    "revision": ("model={name: model, revision: v1}", "is on disk, where there is only one"),
    "tokenizer": ("model={name: model, tokenizer: nowhere/at/all}", "'nowhere/at/all' does not exist"),
    "target": ("lora={target: [no_such_layer]}", "PEFT cannot put this LORA adapter on LlamaForCausalLM"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_one_paragraph(case: str, workplace: Any, tether: Tether) -> None:
    argument, words = WRONG[case]
    code, _, err = tether("train", "run.yaml", argument)
    assert code == 2
    assert words in err[err.index("Error: ") :]
    assert "Traceback" not in err


@pytest.mark.usefixtures("no_weights")
def test_a_tokenizer_with_more_ids_than_the_model_is_refused(workplace: Any, tether: Tether) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workplace.path / "model")
    tokenizer.add_tokens([f"<{n}>" for n in range(20)])
    tokenizer.save_pretrained(workplace.path / "words")
    code, _, err = tether("train", "run.yaml", "model={name: model, tokenizer: words}")
    assert code == 2
    assert "it belongs to another model" in err


@pytest.mark.usefixtures("no_weights")
def test_quantised_weights_without_an_adapter_are_refused_before_they_are_read(workplace: Any, tether: Tether) -> None:
    """INV-5: a checkpoint that was saved quantised; and a quantisation whose package is missing says so."""
    file = workplace.path / "model" / "config.json"
    written = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": written}))
    code, _, err = tether("train", "run.yaml", "lora=null")
    assert code == 2
    assert "quantised and there is no adapter, so nothing could train" in err


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).write_text("ran")

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_inv_39_code_of_a_model_runs_only_when_that_is_said(
    workplace: Any, tether: Tether, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(workplace.path / "modules"))
    marker, folder = workplace.path / "marker", workplace.path / "model"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err = tether("train", "run.yaml", *SHORT)
    assert code == 2
    assert "trust_remote_code" in err
    assert not marker.exists()
    code, _, err = tether("train", "run.yaml", *SHORT, "model={name: model, trust_remote_code: true}")
    assert code == 0, err
    assert marker.read_text() == "ran"
    # What the policy's repository may do, the reference's may not.
    other, theirs = workplace.path / "other", workplace.path / "theirs"
    shutil.copytree(folder, other)
    (other / "own.py").write_text(CODE.format(marker=str(theirs)))
    trusting = ("model={name: model, trust_remote_code: true}", "output=b")
    code, _, err = tether("train", "run.yaml", *SHORT, *trusting, "reference={model: other}")
    assert code == 2
    assert "'other' brings Python code of its own" in err
    assert not theirs.exists()
