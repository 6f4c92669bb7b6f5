"""One process of the golden runs in two processes, started by torchrun: runs every case of them, writes its numbers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from golden.cases import TWO_PROCESSES, run

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {name: run(case, folder / name.replace(": ", "-")) for name, case in TWO_PROCESSES.items()}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Everything is on disk; gloo's threads sometimes abort a process that ends in the ordinary way.
    os._exit(0)
