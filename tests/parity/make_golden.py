"""Writes the golden numbers from TRL 1.16.0. Run it from the repository's root: python tests/parity/make_golden.py"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trl import DPOConfig, DPOTrainer

from parity import test_objectives, test_trl
from support.trl_dpo import digest, run


def golden(cases: dict[str, dict]) -> dict[str, dict]:
    """Three steps of TRL for each case."""
    found = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            steps, _, weights = run(DPOConfig, DPOTrainer, folder, case)
        found[name] = {"steps": steps, "weights": digest(weights)}
    return found


def main() -> None:
    objectives = {name: test_objectives.case(name) for name in test_objectives.CASES}
    for path, cases in ((test_trl.GOLDEN, test_trl.CASES), (test_objectives.GOLDEN, objectives)):
        path.write_text(json.dumps(golden(cases), indent=1) + "\n")


if __name__ == "__main__":
    main()
