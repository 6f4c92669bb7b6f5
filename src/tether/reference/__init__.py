"""The reference policy: what it means, how it is computed, and the guards that keep it right."""

from tether.reference.guard import FrozenProbe, GuardResult, TrainingProof, compare_with_start, require_start_equality
from tether.reference.protocol import SAME, Reference, Scorer
from tether.reference.resolve import Resolved, resolve
from tether.reference.separate import refuse_other_tokenizer
from tether.reference.spec import ReferenceSpec, RemoteOptions, Sync

__all__ = [
    "SAME",
    "FrozenProbe",
    "GuardResult",
    "Reference",
    "ReferenceSpec",
    "RemoteOptions",
    "Resolved",
    "Scorer",
    "Sync",
    "TrainingProof",
    "compare_with_start",
    "refuse_other_tokenizer",
    "require_start_equality",
    "resolve",
]
