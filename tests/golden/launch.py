"""Runs the golden cases of two processes in one launch of torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).parent / "worker.py"


def in_two_processes(folder: Path) -> list[dict[str, Any]]:
    """What each of the two processes found, by the names of the cases."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(_WORKER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    # Judged by what was written: torchrun may report an abort after all work is done.
    written = [folder / f"rank{rank}.json" for rank in (0, 1)]
    if not all(path.is_file() for path in written):
        raise RuntimeError(f"a process wrote no numbers:\n{done.stderr[-3000:]}")
    return [json.loads(path.read_text()) for path in written]
