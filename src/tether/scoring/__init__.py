"""Scoring: packing a forest, tree attention, the fused head, and the one function that uses them."""

from tether.scoring.batch import pack
from tether.scoring.layout.proof import LayoutChoice, choose_layout, score_alone, tolerance
from tether.scoring.score import Layout, score

__all__ = ["Layout", "LayoutChoice", "choose_layout", "pack", "score", "score_alone", "tolerance"]
