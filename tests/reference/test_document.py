"""The examples of docs/reference.md run: Python is executed with a tiny model, run files are read and built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from tether import DPOConfig, DPOTrainer
from tether.config.build import build
from tether.config.load import check_run
from tether.reference.spec import MEANS
from tether.training.reference_arguments import ReferenceArguments
from tiny import pair_rows, tiny_model, tiny_tokenizer

TEXT = (Path(__file__).parents[2] / "docs" / "reference.md").read_text(encoding="utf-8")
RUN_FILES = re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.S | re.M)
SCRIPTS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.S | re.M)


@pytest.mark.parametrize("text", RUN_FILES)
def test_a_run_file_of_the_document_is_one(text):
    values = yaml.safe_load(text)
    arguments, _, keywords = build(check_run({**values, "data": {"train": "pairs.jsonl"}, "output": "unused"}))
    reference = values["reference"]
    declared = reference if isinstance(reference, str) else reference.get("meaning")
    if declared is not None:
        assert arguments.reference == declared
    if isinstance(reference, dict) and "model" in reference:
        assert keywords["ref_model"] == reference["model"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_the_document_runs(script, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    names = {
        "DPOConfig": lambda **changes: DPOConfig(report_to="none", use_cpu=True, disable_tqdm=True, **changes),
        "DPOTrainer": DPOTrainer,
        "PeftModel": PeftModel,
        "get_peft_model": get_peft_model,
        "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        "policy": tiny_model(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2),
        "rows": Dataset.from_list(pair_rows(12)),
        "tokenizer": tokenizer,
        "folder": str(tmp_path),
    }
    exec(compile(script, "docs/reference.md", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].guard is None or names["trainer"].guard.passed


def test_the_document_has_every_means_and_every_option_it_names():
    """A means without a row, or an option that no longer exists, is noticed."""
    for means in {means for allowed in MEANS.values() for means in allowed} - {"none"}:
        assert f"| `{means}` |" in TEXT, means
    for name in re.findall(r"`((?:reference|ref_model|sync_ref)_\w+)", TEXT):
        assert name in ReferenceArguments.__dataclass_fields__, name
    assert len(RUN_FILES) >= 7
    assert len(SCRIPTS) == 3
