"""Objectives: small pure functions of scores, and the table of their names."""

from tether.objectives.preference import preference_loss
from tether.objectives.table import OBJECTIVES, Objective, Range, check_options

__all__ = ["OBJECTIVES", "Objective", "Range", "check_options", "preference_loss"]
