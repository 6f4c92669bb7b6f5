"""The policy of a run without weights: its structure, what trains, and what its numbers take."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from tether.errors import ConfigError
from tether.models.adapting.adapter_files import adapter_config
from tether.models.before.blueprint import blueprint
from tether.models.load import is_adapter
from tether.models.spec import ModelSpec, embed_tokens, select_trainable
from tether.models.structure import disable_dropout, trainable_tensors
from tether.training import PreferenceConfig
from tether.training.setup.policy import for_task, policy_spec

# Bytes a number of a quantised matrix takes; of 4 bits, with a float32 scale for each block of 64.
_QUANTIZED = {"4bit": 0.5 + 4 / 64, "nf4": 0.5 + 4 / 64, "8bit": 1.0, "int8": 1.0}
# Values of PEFT's `init_lora_weights` with which an adapter begins without effect.
_AT_ZERO = (True, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Sketch:
    """A policy without weights.

    Args:
        model: on the device `meta`.
        parameters: numbers in it.
        trainable: numbers of those that train.
        weights: bytes of all.
        trained: bytes of what trains.
        at_zero: whether its adapter begins without effect.
    """

    model: nn.Module
    parameters: int
    trainable: int
    weights: int
    trained: int
    at_zero: bool


def sketch(
    source: str, args: PreferenceConfig, adapter: PeftConfig | None, new_tokens: list[int], *, accelerator: bool
) -> Sketch:
    """The policy as it would be at the first step.

    Args:
        source: the model that is named.
        args: of the run.
        adapter: of a new adapter.
        new_tokens: ids of tokens that are added.
        accelerator: whether the run would compute on one; `dtype: auto` is the checkpoint's then.

    Raises:
        ConfigError: transformers cannot build the model of this configuration.
    """
    spec = policy_spec(source, args)
    config = spec.load_config()
    model: Any = _classifier(config) if args.algorithm == "reward" else blueprint(config)
    if model is None:
        raise ConfigError(f"transformers cannot build a {type(config).__name__} without weights. Plan another model.")
    model.to(_dtype(spec, config, accelerator))
    embed_tokens(model, new_tokens)
    at_zero = True
    # What stands beneath the last adapter is frozen and small, and left out.
    brought = spec.adapters[-1] if spec.adapters else source if is_adapter(source) else None
    if brought is not None:
        theirs = adapter_config(brought)
        model, at_zero = _adapted(model, theirs), False
    if adapter is not None:
        if isinstance(model, PeftModel):
            model = model.get_base_model()  # a frozen adapter beneath a new one: its tensors are small and left out
        at_zero = brought is None and getattr(adapter, "init_lora_weights", True) in _AT_ZERO
        model = _adapted(model, for_task(adapter, model))
    select_trainable(model, args.train_parameters or (), args.freeze_parameters or ())
    if args.disable_dropout:
        disable_dropout(model)
    trains = trainable_tensors(model).values()
    every = list(model.parameters())
    size = _QUANTIZED.get(str(spec.quantization))
    inside = _matrices(model) if size else set()
    weights = sum(int(size * p.numel()) if size and id(p) in inside else _bytes(p) for p in every)
    return Sketch(
        model, sum(p.numel() for p in every), sum(p.numel() for p in trains), weights, sum(map(_bytes, trains)), at_zero
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _classifier(config: Any) -> nn.Module:
    config = copy.deepcopy(config)
    config.num_labels = 1
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def _adapted(model: Any, config: PeftConfig) -> PeftModel:
    copied = copy.deepcopy(config)
    copied.inference_mode = False
    if isinstance(getattr(copied, "init_lora_weights", None), str):
        copied.init_lora_weights = True  # type: ignore[attr-defined]  # others compute with the weights
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return get_peft_model(model, copied)


def _dtype(spec: ModelSpec, config: Any, accelerator: bool) -> torch.dtype:
    named = str(spec.dtype).removeprefix("torch.")
    if named != "auto":
        return getattr(torch, named)
    own = getattr(config.get_text_config(), "dtype", None)
    return own if accelerator and isinstance(own, torch.dtype) else torch.float32


def _matrices(model: nn.Module) -> set[int]:
    """Frozen weights of the layers, which a quantisation packs; embeddings and head stay."""
    found = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    ends = {id(head.weight)} if head is not None else set()
    return {id(weight) for weight in found if not weight.requires_grad} - ends
