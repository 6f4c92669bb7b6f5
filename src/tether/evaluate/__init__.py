"""Evaluation: intervals, generation before and after, judges."""

from tether.evaluate.generate import generate
from tether.evaluate.intervals import bootstrap_mean_difference, mean_interval, wilson_interval
from tether.evaluate.judges import TfidfJudge, VaderJudge

__all__ = ["TfidfJudge", "VaderJudge", "bootstrap_mean_difference", "generate", "mean_interval", "wilson_interval"]
