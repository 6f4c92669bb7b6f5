"""Data parallelism changes nothing for any kind of trainer (INV-25, 26, 41)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "worker_kinds.py"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    """8 x 1 equals 2 x 2 x 2 processes: losses, baselines, evaluation and weights, the last step not full."""
    one, two = tmp_path / "one", tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for folder, command in (
        (one, [sys.executable, str(WORKER), str(one), "8", "1"]),
        (two, [*launch, str(WORKER), str(two), "2", "2"]),
    ):
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        # Judged by what was written: torchrun may report an abort after all work is done.
        assert (folder / "rank0.safetensors").is_file(), done.stderr[-3000:]
    expected = load_file(one / "rank0.safetensors")
    for rank in (0, 1):
        found = load_file(two / f"rank{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=5e-5, rtol=2e-4, msg=name)
