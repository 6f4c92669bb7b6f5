"""Two processes sample, judge, train, evaluate and resume as one does, each with the whole policy or a shard of it
(R9, R10, R21)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "worker_online.py"


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process finds."""
    return _run([sys.executable], tmp_path_factory.mktemp("one"), "whole")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "how", ["ddp", "fsdp", *(pytest.param(how, marks=pytest.mark.deepspeed) for how in ("zero2", "zero3"))]
)
def test_two_processes_train_and_evaluate_as_one(how, one, tmp_path):
    """The same completions, rewards over all of them, one gradient; full weights and LoRA, both engines, pairs too.

    Processes draw different numbers of tokens, and score different numbers of micro-batches in an evaluation. The
    workers assert how the policy is held, and that a resumed run ends in the same bits.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = _run(launch, tmp_path, how)
    expected = load_file(one / "rank0.safetensors")
    for rank in (0, 1):
        found = load_file(two / f"rank{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, atol=5e-5, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
            )


def _run(command: list[str], folder: Path, how: str) -> Path:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*command, str(WORKER), str(folder), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    # Judged by what was written: torchrun may report an abort after all work is done.
    assert (folder / "rank0.safetensors").is_file(), done.stderr[-3000:]
    return folder
