"""The pages for users of other tools: each line of their tables of references is converted, or built, and compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from peft import LoraConfig

from tether.config import load_run_file
from tether.config.foreign import convert_file
from tether.config.foreign.write import run_file_text
from tether.trl import DPOConfig, DPOTrainer, create_reference_model
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs"
BASES = {
    "trl": "model_name_or_path: some/model\ndataset_name: pairs.jsonl\n",
    "axolotl": """\
base_model: some/model
rl: dpo
learning_rate: 1e-5
adapter: lora
lora_r: 4
datasets: [{path: pairs.jsonl, type: chatml.intel}]
""",
    "llamafactory": "model_name_or_path: m\nstage: dpo\nfinetuning_type: lora\ndataset: mine\ndataset_dir: .\n",
}


def cases(name: str, head: str = "keys") -> list[list[str]]:
    """The lines of a page's table of references, without what stands beside it."""
    text = (DOCS / f"coming_from_{name}.md").read_text(encoding="utf-8")
    table = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table]


CASES = [(name, row[0], row[1]) for name in BASES for row in cases(name)]


@pytest.mark.parametrize(("name", "keys", "expected"), CASES)
def test_a_line_of_a_file_is_what_the_page_says(
    name: str, keys: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Path("dataset_info.json").write_text(json.dumps({"mine": {"file_name": "pairs.json", "ranking": True}}))
    Path("file.yaml").write_text(BASES[name])
    overrides = re.split(r" (?=\w+=)", keys)
    found = convert_file("file.yaml", overrides, "dpo" if name == "trl" else None)
    said = yaml.safe_load(expected)
    given = found.values.get("reference", "start")
    given = given["meaning"] if isinstance(given, dict) and given.keys() == {"meaning"} else given
    assert given == said
    Path("run.yaml").write_text(run_file_text(found))
    assert load_run_file("run.yaml").to_dict() == found.run.to_dict()


def test_every_call_of_the_page_for_trl_has_its_reference(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for number, (call, meaning, method, _) in enumerate(cases("trl", "call")):
        policy: Any = tiny_model(**model)
        args: dict[str, Any] = {"output_dir": str(tmp_path / str(number)), "per_device_train_batch_size": 2, **QUIET}
        others: dict[str, Any] = {}
        if "peft_config" in call:
            others["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"])
        if "ref_model" in call:
            others["ref_model"] = create_reference_model(policy) if "create" in call else tiny_model(**model)
        if "reference=" in call:
            args["reference"] = "none"
        run = DPOTrainer(
            model=policy,
            args=DPOConfig(**args),
            train_dataset=Dataset.from_list(pair_rows(4)),
            processing_class=tokenizer,
            **others,
        )
        identity = run.run.reference.identity
        assert (identity.meaning, identity.method) == (meaning, method), call
        assert (run.ref_model is None) == (method != "model"), call


def test_the_python_of_the_page_for_trl_is_there() -> None:
    text = (DOCS / "coming_from_trl.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, {})
