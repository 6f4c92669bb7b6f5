"""Writes golden.json from TRL 1.16.0. Run it from the repository's root: python tests/parity/make_golden.py"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trl import DPOConfig, DPOTrainer

from parity.test_trl import CASES, GOLDEN, digest, run


def main() -> None:
    golden = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            steps, _, weights = run(DPOConfig, DPOTrainer, folder, case)
        golden[name] = {"steps": steps, "weights": digest(weights)}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
