"""Completions sampled from the policy: engines, the proof that they sample from what is trained, rollouts on disk."""

from tether.rollout.files import ReplayEngine
from tether.rollout.records import Completion, Group, RolloutEngine, RolloutRequest, Sampling
from tether.rollout.transformers_engine import TransformersEngine
from tether.rollout.tree_engine import TreeEngine

__all__ = [
    "Completion",
    "Group",
    "ReplayEngine",
    "RolloutEngine",
    "RolloutRequest",
    "Sampling",
    "TransformersEngine",
    "TreeEngine",
]
