"""Two processes sample, judge, train, evaluate and resume as one does (R9, R10, R21)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "worker_online.py"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    """The same completions, rewards over all of them, one gradient; a group of 4 lies in two processes at size 2."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, command in (("one", [sys.executable]), ("two", launch)):
        folder = tmp_path / name
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*command, str(WORKER), str(folder), "8" if name == "one" else "4"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        # Judged by what was written: torchrun may report an abort after all work is done.
        assert (folder / "rank0.safetensors").is_file(), done.stderr[-3000:]
    expected = load_file(tmp_path / "one" / "rank0.safetensors")
    for rank in (0, 1):
        found = load_file(tmp_path / "two" / f"rank{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, atol=5e-5, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
            )
