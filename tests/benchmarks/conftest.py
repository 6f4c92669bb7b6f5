"""The scripts in benchmarks/ import each other by their plain names, as Python finds them when one is run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
