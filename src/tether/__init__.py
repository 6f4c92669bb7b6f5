"""Tether: preference training that never lets the reference policy be wrong.

>>> from tether import DPOConfig, DPOTrainer
"""

from __future__ import annotations

import os
import sys
from collections.abc import Container, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tether.reference import Namespace, Store
    from tether.scoring import pack, score
    from tether.training import (
        CPOConfig,
        CPOTrainer,
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        KTOConfig,
        KTOTrainer,
        OnlineDPOConfig,
        OnlineDPOTrainer,
        ORPOConfig,
        ORPOTrainer,
        RewardConfig,
        RewardTrainer,
        RLOOConfig,
        RLOOTrainer,
        SFTConfig,
        SFTTrainer,
    )

__version__ = "0.1.0"
__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "Namespace",
    "ORPOConfig",
    "ORPOTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "Store",
    "__version__",
    "pack",
    "score",
]


def _wait_briefly(environment: MutableMapping[str, str], modules: Container[str]) -> None:
    """Have torch's threads sleep soon when they wait, where torch is not loaded and the environment says nothing of it.

    GNU's OpenMP, which they are on Linux, spins for 300,000 rounds at the end of each parallel region before a thread
    sleeps (libgomp's `env.c`, GCC 13). Where other processes compute too, a thread that spins takes the core from the
    one that it waits for, and a region of a millisecond takes whole turns of the scheduler. A tenth of it costs nothing
    on a quiet machine; a three-hundredth cost a step a third of its speed there (docs/performance.md). The environment
    is read when torch is loaded.
    """
    if "torch" not in modules and not environment.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        environment["GOMP_SPINCOUNT"] = "30000"


_wait_briefly(os.environ, sys.modules)

# Imported when first used: torch and transformers take seconds, and `tether --help` needs neither.
_HOMES = {name: "training" for name in __all__ if name.endswith(("Config", "Trainer"))}
_HOMES |= {"Namespace": "reference", "Store": "reference", "pack": "scoring", "score": "scoring"}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module 'tether' has no attribute {name!r}")
    if name in _HOMES:
        return getattr(import_module(f"tether.{_HOMES[name]}"), name)
    # Everything else that a script for TRL imports: its arguments, helpers and callbacks.
    trl = import_module("tether.trl")
    if name in trl.__all__ or name in trl.ABSENT:
        return getattr(trl, name)
    raise AttributeError(f"module 'tether' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
