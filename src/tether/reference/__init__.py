"""The reference policy: what it means, how it is computed, and the guards that keep it right."""

from tether.reference.guard import FrozenProbe, GuardResult, TrainingProof, compare_with_start, require_start_equality
from tether.reference.protocol import Reference, Scorer
from tether.reference.resolve import SAME, ReferenceSpec, Resolved, resolve
from tether.reference.store import Store
from tether.reference.store_parts import Namespace
from tether.reference.store_reference import StoreCheck, StoredReference, live_reference, numerics_class

__all__ = [
    "SAME",
    "FrozenProbe",
    "GuardResult",
    "Namespace",
    "Reference",
    "ReferenceSpec",
    "Resolved",
    "Scorer",
    "Store",
    "StoreCheck",
    "StoredReference",
    "TrainingProof",
    "compare_with_start",
    "live_reference",
    "numerics_class",
    "require_start_equality",
    "resolve",
]
