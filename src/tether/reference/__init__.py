"""The reference policy: what it means, how it is computed, and the guards that keep it right."""

from tether.reference.guard import FrozenProbe, GuardResult, TrainingProof, compare_with_start, require_start_equality
from tether.reference.protocol import Reference, Scorer
from tether.reference.resolve import SAME, ReferenceSpec, Resolved, resolve

__all__ = [
    "SAME",
    "FrozenProbe",
    "GuardResult",
    "Reference",
    "ReferenceSpec",
    "Resolved",
    "Scorer",
    "TrainingProof",
    "compare_with_start",
    "require_start_equality",
    "resolve",
]
