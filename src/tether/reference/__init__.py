"""The reference policy: what it means, how it is computed, and the guards that keep it right."""

from tether.reference.base import SAME, Reference
from tether.reference.guard import (
    FrozenProbe,
    GuardResult,
    TrainingProof,
    compare_with_start,
    require_start_equality,
    why_not_at_start,
)
from tether.reference.methods.model import refuse_other_tokenizer
from tether.reference.resolve import Resolved, resolve
from tether.reference.spec import ReferenceSpec, RemoteOptions, Sync
from tether.reference.store.parts import Namespace
from tether.reference.store.reference import StoreCheck, StoredReference, numerics_class
from tether.reference.store.store import Store

__all__ = [
    "SAME",
    "FrozenProbe",
    "GuardResult",
    "Namespace",
    "Reference",
    "ReferenceSpec",
    "RemoteOptions",
    "Resolved",
    "Store",
    "StoreCheck",
    "StoredReference",
    "Sync",
    "TrainingProof",
    "compare_with_start",
    "numerics_class",
    "refuse_other_tokenizer",
    "require_start_equality",
    "resolve",
    "why_not_at_start",
]
