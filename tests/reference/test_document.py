"""The examples of docs/reference.md run: Python is executed with a tiny model, run files are read and built."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from tether import DPOConfig, DPOTrainer
from tether.config.arguments import build
from tether.config.read import check_run
from tether.reference.spec import METHODS
from tether.training.config import ReferenceArguments
from tiny import pair_rows, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
STORE = (ROOT / "docs" / "store.md").read_text(encoding="utf-8")
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
    """A method without a row, or an option that no longer exists, is noticed."""
    for method in {method for allowed in METHODS.values() for method in allowed} - {"none"}:
        assert f"| `{method}` |" in TEXT, method
    for name in re.findall(r"`((?:reference|ref_model|sync_ref)_\w+)", TEXT):
        assert name in ReferenceArguments.__dataclass_fields__, name
    assert len(RUN_FILES) >= 9
    assert len(SCRIPTS) == 3


# -- messages ----------------------------------------------------------------------------------------------------------

PACKAGE = ROOT / "src" / "tether"
# Raised where no user can cause it, or told as the reason inside another message.
NOT_LISTED = {
    "The reference has no weights and no way to load them": "a bug in Tether",
    "There is no reference (meaning none)": "an argument of the Python interface",
    "Got values in": "an argument of the store's Python interface",
    "a value does not match its checksum": "the reason in `is not used: …`",
    "it belongs to another reference": "the reason in `is not used: …`",
    "it lies in the folder of another reference": "the reason in `is not used: …`",
    "… of its … values do not match their checksums": "the reason in `is not used: …`",
    "its keys do not match": "the reason in `is not used: …`",
    "it is not a readable part": "the reason in `is not used: …`",
    "another program rewrote it": "the reason in `is not used: …`",
}


def words(node: ast.expr) -> str:
    """The text of a message in the source, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) for part in node.values)
    return words(node.left) + words(node.right) if isinstance(node, ast.BinOp) else "…"


def texts(*kinds: str, folders: tuple[str, ...]) -> Iterator[str]:
    """What errors of these classes say, in these folders; of `warning`, what is logged."""
    for path in (path for folder in folders for path in sorted((PACKAGE / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).split(".")[-1] in kinds:
                yield words(node.args[0])


def listed(document: str) -> list[str]:
    """The backticked words in the first column of a document's tables of messages."""
    table = document[document.index("\n| message |") :]
    rows = [line for line in table[: table.index("\n\n")].splitlines() if line.startswith("| `")]
    return [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def says(message: str, phrase: str) -> bool:
    return re.search(".*".join(map(re.escape, phrase.split("…"))), message, flags=re.S) is not None


def test_every_diagnosis_in_the_code_has_its_cause_in_the_document():
    """Errors of the reference and its store: none without a row."""
    phrases = listed(TEXT) + listed(STORE)
    for message in texts("ReferencePolicyError", "StoreError", "_error", folders=("reference", "training")):
        if not message.startswith(tuple(NOT_LISTED)):
            assert any(says(message, phrase) for phrase in phrases), message


def test_every_message_in_the_document_is_in_the_code():
    """A row whose message was reworded or removed is noticed; and so is one that another row swallows."""
    kinds = ("ReferencePolicyError", "StoreError", "ConfigError", "TetherError", "_error", "warning")
    messages = list(texts(*kinds, folders=("reference", "training", "cli")))
    phrases = listed(TEXT) + listed(STORE)
    assert len(phrases) > 45
    for phrase in phrases:
        assert any(says(message, phrase) for message in messages), phrase
    assert not any(says(message, "no such words") for message in messages)
    for start in NOT_LISTED:
        assert any(message.startswith(start) for message in messages), start
