"""The accelerator benchmark: exact lengths without a tokenizer file, who failed is said, and it runs on a processor."""

from __future__ import annotations

import importlib.util

import gpu
import pytest
from lengths import Profile, make_rows
from vs_trl_worker import word_tokenizer


def test_words_are_tokens():
    tokenizer = word_tokenizer()
    row = make_rows(tokenizer, Profile(prompt=20, completion=6, pairs=1), steps=1, spread=0.0)[0]
    ids = tokenizer(row["prompt"])["input_ids"]
    assert len(ids) == 20
    assert tokenizer.unk_token_id not in ids
    assert tokenizer(row["prompt"] + row["chosen"])["input_ids"][:20] == ids


def test_the_table_gives_ratios_and_says_who_failed():
    row = {
        "shape": "8b",
        "method": "full",
        "profile": "hh",
        "medians": {"tether": {"step_seconds": 0.5, "peak_mib": 10}, "trl": {"step_seconds": 1.5, "peak_mib": 30}},
    }
    line = gpu.show([row], ["tether", "trl", "trl+liger"]).splitlines()[-1].split()
    assert line == ["8b", "full", "hh", "0.500", "(10", "MiB)", "1.500", "(30", "MiB)", "failed", "3.00x", "-"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_it_runs_on_a_processor(method: str):
    arguments = ["--device", "cpu", "--precision", "float32", "--steps", "1", "--warmup", "1", "--repeats", "1"]
    options = gpu.parse([*arguments, "--threads", "1"])
    found = gpu.measure("tiny", method, "hh", ["tether", "trl"], options)
    assert found["problems"] == []
    assert found["failed"] == {}
    assert set(found["medians"]) == {"tether", "trl"}
