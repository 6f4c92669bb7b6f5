"""A training process on a CPU begins with a heap that stays in one piece.

Torch asks glibc for memory at addresses that are multiples of 64, and glibc cuts that out of a larger piece. It keeps
the slivers beside it in caches of small pieces, where nothing joins them to what becomes free next to them, so that
what one tensor leaves is too small for the next of its size. A step of a LoRA on 138 million weights peaked at 2995 MiB
with these caches and at 2005 without, at the same speed (docs/performance.md). glibc reads the setting when a process
starts, and no later.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

WITHOUT_CACHES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
# The commands that train, or compute as much as that.
TRAINS = frozenset(
    ["train", "demo", "precompute", "sample", "dpo", "kto", "orpo", "cpo", "sft", "reward", "grpo", "rloo"]
)
_SETTING, _BEGUN = "GLIBC_TUNABLES", "TETHER_HEAP_IS_SET"
# Whoever sets one of these has chosen how memory is held.
_CHOSEN = (_SETTING, "LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX")
# Where one is, tensors are in its memory.
_ACCELERATORS = ("/dev/nvidia0", "/dev/kfd")


def keep_in_one_piece(
    arguments: Sequence[str],
    environment: MutableMapping[str, str] = os.environ,
    begin_anew: Callable[[str, list[str], dict[str, str]], Any] = os.execve,
) -> None:
    """Begin this process anew with the setting of its heap, where that helps; returns where it does not, or has.

    Args:
        arguments: what follows `tether`.
        environment: of the process. Its children find nothing of the setting there; each that trains does the same.
        begin_anew: puts another program into this process.
    """
    if environment.pop(_BEGUN, None):
        environment.pop(_SETTING, None)
        return
    if not TRAINS.intersection(arguments[:1]) or not _is_glibc() or sys.gettrace() is not None:
        return
    if any(name in environment for name in _CHOSEN) or any(Path(device).exists() for device in _ACCELERATORS):
        return
    begin_anew(sys.executable, sys.orig_argv, {**environment, _SETTING: WITHOUT_CACHES, _BEGUN: "1"})


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):
        return False
