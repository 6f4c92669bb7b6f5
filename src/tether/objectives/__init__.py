"""Objectives: small pure functions of scores, and the one registry of them."""

from tether.objectives.combination import Combination
from tether.objectives.objective import Algorithm, Input, Objective, Option, Problem, Range
from tether.objectives.registry import OBJECTIVES, check_options, options_of, run_file_row, unknown_loss

__all__ = [
    "OBJECTIVES",
    "Algorithm",
    "Combination",
    "Input",
    "Objective",
    "Option",
    "Problem",
    "Range",
    "check_options",
    "options_of",
    "run_file_row",
    "unknown_loss",
]
