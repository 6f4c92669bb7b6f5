"""Records numbers.json again. Never run it, unless behaviour is changed on purpose and the commit says so.

    OMP_NUM_THREADS=1 python tests/golden/record.py [words of the cases to record; none: all of them]

Every number of the golden cases is written as Python prints it, so that it is read back to the bit.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# Before torch is loaded: threads other than this one take their number from here.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from golden.cases import ONE_PROCESS, TWO_PROCESSES, run
from golden.launch import in_two_processes

NUMBERS = Path(__file__).parent / "numbers.json"


def text_of(numbers: dict[str, Any]) -> str:
    """JSON with one line for each log and each tensor, so that a change can be read."""

    def written(value: Any, indent: str) -> str:
        inner = indent + " "
        if isinstance(value, dict) and any(isinstance(one, dict | list) for one in value.values()):
            lines = [f"{inner}{json.dumps(name)}: {written(one, inner)}" for name, one in value.items()]
            return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            return "[\n" + ",\n".join(inner + written(one, inner) for one in value) + f"\n{indent}]"
        return json.dumps(value)

    return written(numbers, "") + "\n"


def record(words: list[str], folder: Path) -> dict[str, Any]:
    """The numbers of all cases, run anew where a word is in the name."""
    kept = json.loads(NUMBERS.read_text()) if words else {}
    names = [name for name in [*ONE_PROCESS, *TWO_PROCESSES] if not words or any(word in name for word in words)]
    found = {name: run(ONE_PROCESS[name], folder / str(i)) for i, name in enumerate(names) if name in ONE_PROCESS}
    if any(name in TWO_PROCESSES for name in names):
        both = in_two_processes(folder)[0]
        found |= {name: both[name] for name in names if name in TWO_PROCESSES}
    return {name: found.get(name, kept.get(name)) for name in [*ONE_PROCESS, *TWO_PROCESSES]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TETHER_CACHE"] = str(Path(folder) / "cache")
        NUMBERS.write_text(text_of(record(sys.argv[1:], Path(folder))))
