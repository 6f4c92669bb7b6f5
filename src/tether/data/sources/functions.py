"""Functions that a run names, in a file or a module, run as the user: transforms of rows here, rewards further up."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from tether.errors import ConfigError, DataError

Row = Mapping[str, Any]
Transform = Callable[[Row], dict[str, Any]]


def local_function(place: str, what: str) -> Callable[..., Any]:
    """A function in a local file, such as `rewards.py:brevity`, or in an installed module, `my_rewards.short:brevity`.

    Args:
        place: of it.
        what: to call it in messages, such as "a reward function".

    Raises:
        ConfigError: no such file, module or function, or a file that cannot be run.
    """
    name, _, function = place.rpartition(":")
    if name.endswith(".py") and not Path(name).expanduser().is_file():
        raise ConfigError(f"{what[:1].upper()}{what[1:]} is {place!r}, and there is no file {name}. Correct the path.")
    module = _run_file(Path(name).expanduser()) if name.endswith(".py") else _installed(name)
    if module is None or not function:
        raise ConfigError(
            f"{what[:1].upper()}{what[1:]} is {place!r}; expected a Python file and a function in it, file.py:name, or "
            "an installed module, module:name."
        )
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise ConfigError(f"{name} has no function {function!r}; it has {', '.join(known) or 'none'}.")
    return found


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tether_local_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        line = next(
            (frame.lineno for frame in reversed(extract_tb(error.__traceback__)) if frame.filename == str(path)), 0
        )
        place = f" at line {line}" if line else ""  # a syntax error says its own
        raise ConfigError(f"{path} cannot be run{place}: {type(error).__name__}: {error}. Correct it.") from error
    return module


def _installed(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name) if name else None
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise


class _Settings(dict[str, Any]):
    """What Axolotl gives the maker of a transform: its settings, of which a run file has none."""

    __getattr__ = dict.get


def transform_of(place: str, name: str) -> Transform:
    """What makes of a row one with TRL's columns.

    A function whose first parameter is `cfg` makes the transform, as those of Axolotl's data sets do; it returns it
    alone or with a mapping in which `remove_columns` names the columns that go.

    Args:
        place: of a function of a row.
        name: what to call the rows in messages.

    Raises:
        ConfigError: no such file or function.
    """
    function, gone = local_function(place, "a transform of rows"), ()
    if next(iter(inspect.signature(function).parameters), "") == "cfg":
        made = function(_Settings())
        function, options = made if isinstance(made, tuple) else (made, {})
        gone = tuple(options.get("remove_columns") or ())

    def transform(row: Row) -> dict[str, Any]:
        made = function(dict(row))
        if not isinstance(made, Mapping):
            raise DataError(f"{name}: the transform {place} made a {type(made).__name__} of a row; expected a mapping.")
        return {key: value for key, value in {**row, **made}.items() if key in made or key not in gone}

    return transform
