"""A policy in shards has the reference that a whole one has (INV-36)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "sharded_worker.py"
MEANS = {
    "full": "snapshot",
    "lora": "adapter_off",
    "snapshot": "snapshot",
    "released": "snapshot",
    "moving": "snapshot",
    "moving model": "model",
}


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("kind", MEANS)
def test_fsdp2_trains_against_the_reference_of_one_process(kind, tmp_path):
    """Log-probs of a probe before and after steps, losses and weights; the workers assert that parameters are shards.

    `full` and `lora` are those of INV-36; `snapshot` is an adapter that starts at random, `released` a snapshot that
    was on disk, each process' shards for themselves, `moving` is TR-DPO, whose checkpoint holds the gathered
    reference, and `moving model` the same with a whole second model that shards are gathered for.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for folder, command in (
        (one, [sys.executable, str(WORKER), str(one), kind, "whole"]),
        (two, [*launch, str(WORKER), str(two), kind, "sharded"]),
    ):
        folder.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        # Judged by what was written: torchrun may report an abort after all work is done.
        assert (folder / "rank0.safetensors").is_file(), done.stderr[-3000:]
        assert (folder / "means0.txt").read_text() == MEANS[kind]
    expected = load_file(one / "rank0.safetensors")
    for rank in (0, 1):
        found = load_file(two / f"rank{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=name)
        moved = (found["after"] - found["before"]).abs().max()
        assert moved > 1e-3 if kind.startswith("moving") else moved <= 1e-5
    if kind.startswith("moving"):
        mine, theirs = (load_file(folder / "checkpoint-4" / "reference.safetensors") for folder in (one, two))
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(theirs[name], value, atol=2e-5, rtol=1e-4, msg=name)
