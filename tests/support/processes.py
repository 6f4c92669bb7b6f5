"""How a worker is started in several processes."""

from __future__ import annotations

import sys


def torchrun(processes):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
