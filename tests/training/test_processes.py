"""Data parallelism changes nothing but the time (INV-25, 26, 36)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.processes import torchrun

WORKER = Path(__file__).parent / "worker.py"


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("size", "tokens"),
    [pytest.param(2, 0, id="accumulation"), pytest.param(2, 90, marks=pytest.mark.slow, id="budget")],
)
def test_two_processes_train_and_evaluate_as_one(size, tokens, tmp_path):
    """8 x 1 equals 2 x 2 x 2 processes: losses, metrics, evaluation, reference log-probs and weights.

    With a budget of tokens, 2 x 2 x 2 processes make equally many forwards, though one needs fewer than the other.
    The model has a buffer of true and false, which DDP sends with the others.
    13 rows make a last step that is not full, in whose last round one process has no row, and 7 rows of evaluation do
    not divide by 2 processes.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, command in (
        (one, [sys.executable, str(WORKER), str(one), "8", "1", "0"]),
        (two, [*torchrun(2), str(WORKER), str(two), str(size), str(4 // size), str(tokens)]),
    ):
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        # Judged by what was written: torchrun may report an abort after all work is done.
        assert (folder / "rank0.safetensors").is_file(), done.stderr[-3000:]
    expected = load_file(one / "rank0.safetensors")
    for rank in (0, 1):
        found = load_file(two / f"rank{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=name)

    told = [json.loads((two / f"ddp{rank}.json").read_text()) for rank in (0, 1)]
    assert told == [{"find_unused_parameters": True, "broadcast_buffers": True, "bucket": 2**20, "backend": "gloo"}] * 2
    counts = [json.loads((two / f"counts{rank}.json").read_text()) for rank in (0, 1)]
    needed, made = zip(*(zip(*rank, strict=True) for rank in counts), strict=True)
    assert made[0] == made[1]
    assert (needed[0] != needed[1]) == bool(tokens)
