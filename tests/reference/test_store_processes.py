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
LAUNCH = {
    "ddp": [pytest.mark.multiprocess, pytest.mark.slow],
    "fsdp": [pytest.mark.multiprocess, pytest.mark.slow],
    "zero3": [pytest.mark.multiprocess, pytest.mark.deepspeed],
}


@pytest.mark.parametrize("how", [pytest.param(how, marks=marks) for how, marks in LAUNCH.items()])
def test_two_processes_fill_one_store_in_the_first_epoch_and_share_it(how, tmp_path):
    """13 rows, shuffled anew each epoch, so that in the second epoch each process meets rows of the other.

    What they stored equals, per token, what the live reference of one process says; a second run, by both and by one,
    makes no pass. In shards every pass is joined by both processes, also in the evaluation of 5 rows, of which one
    process has 3 and the other 2.
    """
    store = str(tmp_path / "store")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launched(*torchrun, str(WORKER), str(tmp_path), store, "cold", "warm", how, wrote=tmp_path / "warm" / "rank1.json")
    launched(sys.executable, str(WORKER), str(tmp_path), store, "one", "whole", wrote=tmp_path / "one" / "rank0.json")
    cold, warm = (
        [json.loads((tmp_path / name / f"rank{rank}.json").read_text()) for rank in (0, 1)] for name in ("cold", "warm")
    )
    one = json.loads((tmp_path / "one" / "rank0.json").read_text())
    for rank in cold:
        # 13 rows make 7 for each process, in batches of 2: the last one is uneven. No pass in the second epoch, and
        # none in the second evaluation.
        assert rank["passes"][:2] == [4, 0]
        assert rank["passes"][2] >= 2
        assert rank["passes"][3] == 0
    if how != "ddp":
        assert cold[0]["passes"] == cold[1]["passes"]
    assert sum(rank["computed"] for rank in cold) >= 2 * 18
    for again in (*warm, one):
        assert (again["computed"], sum(again["passes"])) == (0, 0)
    np.testing.assert_allclose(one["stored"], one["live"], atol=1e-5, rtol=0)
    for rank in (*cold, *warm):
        np.testing.assert_array_equal(rank["stored"], one["stored"])
        np.testing.assert_allclose(rank["live"], one["live"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(rank["losses"], cold[0]["losses"][0], rtol=1e-5)


def launched(*command: str, wrote: Path) -> None:
    """Judged by what was written: torchrun may report an abort after all work is done."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert wrote.is_file(), done.stderr[-3000:]
