"""What a run sets on a model for its own sake, and how the model is saved without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from tether.models.structure import random_rates, transformers_model, unwrap

_CACHE = "use_cache"
_GENERATION = "generation_config.json"


class OwnSettings:
    """The settings of a policy's configurations that training changes, as they were when it came.

    transformers' trainer switches the key-value cache off, and `disable_dropout` sets rates to 0. Saved with the model,
    either would make another model of it for whoever loads it.

    Args:
        model: before the run has changed anything.
    """

    def __init__(self, model: nn.Module) -> None:
        found = (getattr(module, "config", None) for module in transformers_model(model).modules())
        configs = {id(config): config for config in found if config is not None}
        self._kept: list[tuple[Any, str, Any]] = [
            (config, name, vars(config)[name])
            for config in configs.values()
            for name in (*random_rates(config), *([_CACHE] if _CACHE in vars(config) else []))
        ]

    def restore_cache(self) -> None:
        """Put the key-value cache's setting back for good; every forward of a run says itself that it wants none."""
        for config, name, value in self._kept:
            if name == _CACHE:
                setattr(config, name, value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the configurations are as they came."""
        now = [(config, name, getattr(config, name)) for config, name, _ in self._kept]
        try:
            for config, name, value in self._kept:
                setattr(config, name, value)
            yield
        finally:
            for config, name, value in now:
                setattr(config, name, value)


def invalid_generation(model: nn.Module) -> str:
    """Why transformers would not save a model's generation configuration; empty where it would."""
    inner = unwrap(model)
    settings = getattr(inner, "generation_config", None)
    if not isinstance(inner, PreTrainedModel) or not isinstance(settings, GenerationConfig):
        return ""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split("\nIf you're using")[0].split()).removeprefix("GenerationConfig is invalid: ")
    return ""


@contextmanager
def generation_as_it_is(model: nn.Module, folder: Path, *, write: bool) -> Iterator[None]:
    """Inside, a model is saved by transformers, also where that would refuse its generation configuration.

    It is then written as it is: a save that fails when training is done is worse than settings that only warn, and
    leaving some of them out would change what is saved.
    """
    if not invalid_generation(model):
        yield
        return
    inner: Any = unwrap(model)
    kept, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = kept
    if write:
        (folder / _GENERATION).write_text(kept.to_json_string(), encoding="utf-8")
