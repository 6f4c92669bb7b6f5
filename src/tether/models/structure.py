"""What a model is made of: the transformers model inside wrappers, its head, its trainable tensors, its adapters."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from tether.compat.bitsandbytes import keep_quantized_layout
from tether.compat.messages import BIAS_STAYS
from tether.compat.peft import added_parameters, injected_configs, set_active, switch_layers
from tether.compat.torch import DropoutLayer, compiled_module
from tether.errors import ConfigError

logger = logging.getLogger("tether")
# Names of rates that make a forward in training mode random.
_RANDOM = re.compile("drop|jitter")


def unwrap(model: nn.Module) -> PreTrainedModel | PeftModel:
    """The model inside the wrappers of data parallelism and compilation."""
    while not isinstance(model, (PreTrainedModel, PeftModel)):
        inner = getattr(model, "module", compiled_module(model))
        if inner is None:
            raise ConfigError(f"{type(model).__name__} is neither a transformers model nor a PEFT model around one.")
        model = inner
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, where it was given in `torch.compile`: saved with that, its tensors have names that nothing
    loads."""
    inner = compiled_module(model)
    if inner is None:
        return model
    logger.info("policy: taken out of torch.compile, which a run does itself (torch_compile=True)")
    return inner


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside everything, adapters included; adapters on its layers stay in place."""
    inner = unwrap(model)
    base = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    if not isinstance(base, PreTrainedModel):
        raise ConfigError(f"The adapter is on a {type(base).__name__}, which is no transformers model.")
    return base


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name to parameter, for every parameter that requires a gradient; a shared one is listed once."""
    return {name: parameter for name, parameter in unwrap(model).named_parameters() if parameter.requires_grad}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name to parameter, for everything that is out of effect while adapters are off."""
    inner = unwrap(model)
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in inner.named_modules()
        for name, parameter in added_parameters(module)
    }


def adapter_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """Name to configuration of the adapters on a model, whether PEFT is around it or transformers put them into it."""
    inner = unwrap(model)
    return dict(inner.peft_config) if isinstance(inner, PeftModel) else injected_configs(inner)


def require_adapter(model: nn.Module) -> None:
    """Refuse a PEFT model whose adapter is no more on its layers: it would be saved without what it learnt.

    Raises:
        ConfigError: with what to do.
    """
    inner = unwrap(model)
    if not isinstance(inner, PeftModel) or not isinstance(inner.base_model, BaseTuner):
        return
    # In front of each reference pass: the first tensor that is found is enough.
    if next((True for module in inner.modules() for _ in added_parameters(module)), None) is None:
        raise ConfigError(
            "The adapter of the policy was merged into it or taken off (merge_and_unload, unload), so that there is no "
            "adapter to save, and no policy without it to compare with. Save what merge_and_unload returned with its "
            "own save_pretrained; evaluate before it, or with `tether eval`."
        )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it computes without any adapter."""
    inner = unwrap(model)
    if not adapter_configs(inner):
        yield
        return
    require_adapter(inner)
    # Turning adapters on again makes PEFT mark their tensors trainable, also those that were not.
    required = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
    try:
        with ExitStack() as stack:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", BIAS_STAYS)
                if isinstance(inner, PeftModel):
                    stack.enter_context(inner.disable_adapter())
                else:
                    stack.callback(switch_layers, inner, on=True)
                    switch_layers(inner, on=False)
            yield
    finally:
        for parameter, value in required:
            parameter.requires_grad_(value)


@contextmanager
def adapter_on(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, the model computes with the adapter `name` and no other; nothing becomes trainable or frozen by it."""
    inner = unwrap(model)
    if not isinstance(inner, PeftModel) or name not in inner.peft_config:
        known = ", ".join(map(repr, inner.peft_config)) if isinstance(inner, PeftModel) else "none"
        raise ConfigError(f"The model has no adapter {name!r}; it has {known}.")
    required = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
    before = list(inner.active_adapters)
    try:
        set_active(inner, [name], trains=False)
        yield
    finally:
        set_active(inner, before, trains=False)
        for parameter, value in required:
            parameter.requires_grad_(value)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode (dropout off); afterwards each is as it was."""
    keep_quantized_layout(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def own_generation_settings_away(*models: nn.Module) -> Iterator[None]:
    """Inside, `generate` finds no settings of the checkpoint to fill in, such as a last token that is forced."""
    held: list[tuple[Any, Any]] = [
        (model, model.generation_config) for model in models if hasattr(model, "generation_config")
    ]
    for model, _ in held:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for model, config in held:
            model.generation_config = config


def disable_dropout(model: nn.Module) -> None:
    """Set every rate of dropout, layer drop and router jitter to 0, in modules and in configurations."""
    for module in model.modules():
        if isinstance(module, DropoutLayer):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name in random_rates(holder):
                setattr(holder, name, 0.0)


def random_rates(holder: object) -> list[str]:
    """Names of the rates above 0, of a module or a configuration, that make a forward in training mode random."""
    values = vars(holder).items() if holder is not None else ()
    return [name for name, value in values if isinstance(value, float) and value and _RANDOM.search(name)]


def dtype_of(model: nn.Module) -> torch.dtype:
    """Dtype of the weights that most of the model's numbers are in; quantised weights do not count."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype])
