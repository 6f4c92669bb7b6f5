"""The files of an adapter's folder: each is read whole, or refused by its name before a policy depends on it.

PEFT checks little of what it reads, and fails wherever a value is first used. Called by `adapters` and whoever has PEFT
read a folder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open

from tether.errors import ConfigError, TetherError
from tether.files import write_whole
from tether.models.adapting.extra_tensors import WEIGHTS

CONFIG = "adapter_config.json"
_SUM = f"{WEIGHTS}.sha256"
# Memory is taken for so many rows of each layer; none has as many.
_MOST_ROWS = 100_000


def adapter_config(folder: str | Path) -> PeftConfig:
    """The configuration of the adapter in a folder.

    Raises:
        ConfigError: it cannot be read, or is of a kind that the installed PEFT does not know.
    """
    with _refused(f"'{Path(folder) / CONFIG}' cannot be read"):
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config.base_model_name_or_path, str | None):
            raise ValueError(f"base_model_name_or_path is {config.base_model_name_or_path!r}; it must be text")
        for name, value in vars(config).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; it must be a finite number")
            if name in ("r", "num_virtual_tokens") and isinstance(value, int | float) and value > _MOST_ROWS:
                raise ValueError(f"{name} is {value:,}; it may be {_MOST_ROWS:,} at most")
        return config


def require_weights(folder: str | Path) -> None:
    """Refuse a folder whose weights are missing or are not safetensors.

    Raises:
        ConfigError: with the name of the file; or they are not what a run saved there.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ConfigError(
            f"The adapter '{folder}' has no {WEIGHTS}. Pickled adapters (adapter_model.bin) are never loaded, as a "
            "pickle can run any code: save the adapter again with safetensors."
        )
    with _refused(f"'{path}' cannot be read"):
        with safe_open(path, framework="pt"):
            pass  # opening it reads the list of its tensors, which must fill the file
        note = Path(folder) / _SUM
        if note.is_file() and note.read_text(encoding="utf-8").split()[:1] != [_digest(path)]:
            raise ValueError(f"it has other bytes than {_SUM} has the hash of; if that is meant, remove {_SUM}")


def write_sums(model: PeftModel, folder: Path) -> None:
    """Keep the hashes of the weights that were written of a model's adapters beside them, as `sha256sum` has them:
    numbers that are damaged later are numbers, too."""
    for place in (folder, *(folder / name for name in model.peft_config)):
        if (place / WEIGHTS).is_file():
            write_whole(place / _SUM, f"{_digest(place / WEIGHTS)}  {WEIGHTS}\n")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def put_on(base: torch.nn.Module, folder: str | Path) -> Iterator[None]:
    """Inside, PEFT puts the adapter of a folder on a base; what it says of files that do not fit is said with both.

    Raises:
        ConfigError: the weights are missing or damaged, or do not fit.
    """
    require_weights(folder)
    model = f"{type(base).__name__} '{getattr(getattr(base, 'config', None), 'name_or_path', '')}'"
    with _refused(f"The adapter '{folder}' does not fit {model}", "Name the model that it was made on, or copy"):
        yield


@contextmanager
def _refused(what: str, advice: str = "Copy") -> Iterator[None]:
    try:
        yield
    except (TetherError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of PEFT, torch and safetensors, which have no error of theirs in common
        reason = " ".join(str(error).split())[:300].rstrip(".")
        if not isinstance(error, (OSError, ValueError, RuntimeError, UserWarning)):
            reason = f"{type(error).__name__}: {reason}"
        raise ConfigError(f"{what}: {reason}. {advice} its folder again from where it was saved.") from error
