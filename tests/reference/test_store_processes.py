"""Two processes train on one store: what each computed, both read (INV-12, 14)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("store_trainer.py")


@pytest.mark.multiprocess
def test_two_processes_fill_one_store_in_the_first_epoch_and_share_it(tmp_path):
    """13 rows, shuffled anew each epoch, so that in the second epoch each process meets rows of the other.

    What they stored equals, per token, what the live reference of one process says; a run by one process needs none.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, command in (("two", torchrun), ("one", [sys.executable])):
        (tmp_path / name).mkdir()
        started = [*command, str(WORKER), str(tmp_path / name), str(tmp_path / "store")]
        done = subprocess.run(started, env=environment, capture_output=True, text=True, timeout=300)
        assert (tmp_path / name / "rank0.json").is_file(), done.stderr[-3000:]
    two = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    one = json.loads((tmp_path / "one" / "rank0.json").read_text())
    for rank in two:
        # 13 rows make 7 for each process, in batches of 2: the last one is uneven. No pass in the second epoch.
        assert rank["passes_by_epoch"][0] == 4
        assert rank["passes_by_epoch"][1] == 0
    assert sum(rank["computed"] for rank in two) >= 2 * 13
    assert (one["computed"], sum(one["passes_by_epoch"])) == (0, 0)
    np.testing.assert_allclose(one["stored"], one["live"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(two[0]["stored"], one["stored"])
