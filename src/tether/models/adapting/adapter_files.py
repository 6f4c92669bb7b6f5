"""The files of an adapter's folder: each is read whole, or refused by its name before a policy depends on it.

PEFT checks little of what it reads, and fails wherever a value is first used. Called by `adapters` and whoever has PEFT
read a folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import safe_open

from tether.errors import ConfigError, TetherError
from tether.models.adapting.extra_tensors import WEIGHTS

CONFIG = "adapter_config.json"
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
        for name in ("r", "num_virtual_tokens"):
            rows = getattr(config, name, None)
            if isinstance(rows, int | float) and not rows <= _MOST_ROWS:
                raise ValueError(f"{name} is {rows:,}; it may be {_MOST_ROWS:,} at most")
        return config


def require_weights(folder: str | Path) -> None:
    """Refuse a folder whose weights are missing or are not safetensors.

    Raises:
        ConfigError: with the name of the file.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ConfigError(
            f"The adapter '{folder}' has no {WEIGHTS}. Pickled adapters (adapter_model.bin) are never loaded, as a "
            "pickle can run any code: save the adapter again with safetensors."
        )
    with _refused(f"'{path}' cannot be read"), safe_open(path, framework="pt"):
        pass  # opening it reads the list of its tensors, which must fill the file


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
