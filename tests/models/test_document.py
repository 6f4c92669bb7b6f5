"""docs/models.md: its run files are read and built, its scripts run, and its table of kinds is what PEFT's are here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tether import DPOConfig
from tether.config.arguments import build
from tether.config.read import check_run
from tether.config.sections import ADAPTERS, Model
from tether.models.adapters import stack_adapter, write_active
from tiny import tiny_model

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
RUN_FILES = re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.S | re.M)
SCRIPTS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.S | re.M)


@pytest.mark.parametrize("text", RUN_FILES)
def test_a_run_file_of_the_document_is_one(text):
    values = yaml.safe_load(text)
    build(check_run({**values, "data": {"train": "pairs.jsonl"}, "output": "unused"}))


def test_the_first_run_file_has_every_key():
    assert set(yaml.safe_load(RUN_FILES[0])["model"]) == set(Model.model_fields)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_the_document_runs(script, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), lora).save_pretrained(tmp_path / "sft")
    model = stack_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "sft", lora)
    model.save_pretrained(tmp_path / "run")
    write_active(model, tmp_path / "run")
    names = {
        "DPOConfig": lambda **changes: DPOConfig(report_to="none", use_cpu=True, **changes),
        "PeftModel": PeftModel,
        "base": AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        "folder": str(tmp_path / "run"),
    }
    exec(compile(script, "docs/models.md", "exec"), names)
    if "set_adapter" in script:
        assert names["model"].active_adapters == ["default", "frozen"]


def test_every_kind_in_the_table_is_one_that_a_run_file_takes():
    """And every kind that a run file takes is in the table."""
    table = TEXT[TEXT.index("| kind |") : TEXT.index("**Virtual tokens.**")]
    sections = re.findall(r"`((?:lora|peft): \{.*?\})`", table)
    assert len(sections) >= 12
    for section in sections:
        build(check_run({"model": "m", "data": {"train": "x"}, "output": "unused", **yaml.safe_load(section)}))
    for kind in ADAPTERS.keys() - {"lora", "lokr", "oft", "hra"}:
        assert f"type: {kind}" in table, kind


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_run_files(path):
    arguments, adapter, _ = build(check_run(yaml.safe_load(path.read_text(encoding="utf-8"))))
    assert adapter is not None
    assert {"quantization", "adapter"} & arguments.model_init_kwargs.keys()
