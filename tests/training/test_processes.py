"""Data parallelism changes nothing but the time (INV-25, 26, 36)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "worker.py"


@pytest.mark.multiprocess
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    """8 x 1 equals 2 x 2 x 2 processes: losses, metrics, evaluation, reference log-probs and weights.

    12 rows make a last step that is not full, and 7 rows of evaluation do not divide by 2 processes.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, command in (
        (one, [sys.executable, str(WORKER), str(one), "8", "1"]),
        (two, [*torchrun(2), str(WORKER), str(two), "2", "2"]),
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


def torchrun(processes):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
