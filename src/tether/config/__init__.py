"""The YAML run file: read strictly, checked whole, turned into what the trainer takes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tether.config.arguments import build, split_batch
    from tether.config.fields import trainer_class
    from tether.config.keys.schema import json_schema
    from tether.config.read import check_run, load_run_file
    from tether.config.run import RunConfig

__all__ = [
    "RunConfig",
    "build",
    "check_run",
    "json_schema",
    "load_run_file",
    "split_batch",
    "trainer_class",
]
# Imported when first used: the configurations need torch, which a file with a mistake in it does not wait for.
_HOMES = {
    "RunConfig": "run",
    "build": "arguments",
    "check_run": "read",
    "json_schema": "keys.schema",
    "load_run_file": "read",
    "split_batch": "arguments",
    "trainer_class": "fields",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tether.config' has no attribute {name!r}")
    # No module may have one of these names: once it is imported it would stand here in place of what is meant.
    return getattr(import_module(f"tether.config.{_HOMES[name]}"), name)
