"""What a launcher (torchrun, accelerate, mpirun) says in the environment: how many processes, and which this is.

The one reader of these variables. It imports no library, so that a command can ask before anything is loaded.
"""

from __future__ import annotations

import os

from tether.errors import ConfigError

# Where launchers say how many processes they started, and which one this is: as accelerate looks for them; and where
# others do, which nothing here joins to one run: Slurm, Flux and IBM's jsrun, PMIx and Cray's PALS.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
OTHER_SIZES = ("SLURM_STEP_NUM_TASKS", "FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE")
OTHER_RANKS = ("PMIX_RANK", "PALS_RANKID", "FLUX_TASK_RANK", "JSM_NAMESPACE_RANK")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# Numbers, of which torch, accelerate and transformers take most for such without asking, and the least each may be. A
# rank of -1 is none.
_LEAST = {
    **dict.fromkeys((*SIZES, "LOCAL_WORLD_SIZE", *OTHER_SIZES), 1),
    **dict.fromkeys((*RANKS, "LOCAL_RANK", *OTHER_RANKS), -1),
    "MASTER_PORT": 0,
}


def number(name: str, default: int) -> int:
    """A variable that a launcher sets.

    Args:
        name: of the variable, one of a size, a rank or a port.
        default: where it is not set.

    Raises:
        ConfigError: it is no whole number, or one that no launcher sets.
    """
    said = os.environ.get(name)
    if said is None:
        return default
    least = _LEAST[name]
    text = said.strip().removeprefix("-") if least < 0 else said.strip()
    found = int(said) if text.isascii() and text.isdecimal() else None
    if found is None or found < least:
        why = "that is not a whole number" if found is None else f"the least that a launcher sets is {max(least, 0)}"
        raise ConfigError(
            f"{name} is {said!r} in the environment, and {why}. Launchers set it. Unset it for a run of one process, "
            "or start with `--launch N`, `torchrun --nproc_per_node N` or `accelerate launch`."
        )
    return found


def require_numbers() -> None:
    """Refuse variables of launchers that libraries would fail to make numbers of.

    Raises:
        ConfigError: which one, and what to do.
    """
    for name in _LEAST:
        number(name, 0)


def processes() -> int:
    """How many processes torchrun or accelerate started; 1 without them."""
    return number("WORLD_SIZE", 1)


def processes_here() -> int:
    """How many of them are on this machine."""
    return number("LOCAL_WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this is the process that speaks for all."""
    return number("RANK", 0) <= 0


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "RANK" in os.environ or processes() > 1


def launched_precision() -> str:
    """The precision that `accelerate launch` was told, or its configuration file; empty where nothing was said."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "")
