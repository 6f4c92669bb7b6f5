"""Objectives: small pure functions of scores, and the table of their names."""

from tether.objectives.combination import Combination
from tether.objectives.preference import preference_loss
from tether.objectives.row import Objective, Range
from tether.objectives.table import OBJECTIVES, check_options

__all__ = ["OBJECTIVES", "Combination", "Objective", "Range", "check_options", "preference_loss"]
