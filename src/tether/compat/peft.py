"""Places of PEFT that it does not document: how adapters lie in a model; read in peft 0.21.2."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

# What PEFT puts around a layer: to adapt it, or to train a copy of it or some of its rows. Not exported at its top.
ADDED = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def added_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name, inside the module, and parameter of what an adapter has added to it itself."""
    if isinstance(module, ADDED):
        owned = tuple(f"{name}." for name in module.adapter_layer_names)
        for name, parameter in module.named_parameters():
            if f"{name}.".startswith(owned):
                yield name, parameter


def is_original(module: Any, child: str) -> bool:
    """Whether a child of what PEFT put around a layer leads to the layer, and not to what was added."""
    if isinstance(module, BaseTunerLayer):
        return child == "base_layer"
    # The second name is of single trained tokens, where the original lies one layer further down.
    return child in ("original_module", "token_adapter")


def layer_under(layer: Any) -> nn.Module:
    """The plain layer that adapters were put around."""
    while isinstance(layer, ADDED):
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    return layer


def merged_layer(layer: Any) -> nn.Module:
    """A plain layer with an adapter's layer merged into it; what was given stays as it is.

    `merge_and_unload` merges a whole model, of which this makes no second one.
    """
    twin: Any = copy.deepcopy(layer)
    if hasattr(twin, "unload_and_optionally_merge_module"):
        return twin.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    twin.merge(safe_merge=False)
    return twin.get_base_layer()


def values_of_few_tokens(module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Values that an adapter has learnt, and what is in their place without it, where they act on few tokens only.

    That is in layers that are trained whole, in single trained tokens, and in embeddings with an adapter on them.
    """
    if isinstance(module, ModulesToSaveWrapper):
        copies = [kept for name, kept in module.modules_to_save.items() if name in module.active_adapters]
        original = list(module.original_module.parameters())
        for kept in copies:
            yield from zip(kept.parameters(), original, strict=True)
    elif isinstance(module, TrainableTokensLayer):
        originals: Any = module.trainable_tokens_original
        yield from ((delta, originals[name]) for name, delta in module.trainable_tokens_delta.items())
    elif isinstance(module, LoraEmbedding):
        for delta in map(module.get_delta_weight, module.active_adapters):
            yield delta, torch.zeros_like(delta)


def set_active(model: PeftModel, names: Sequence[str], *, trains: bool) -> None:
    """Have the named adapters in effect, and no other.

    `PeftModel.set_adapter` takes one name; several, and frozen ones, are taken by the tuner inside.

    Args:
        model: with these adapters on it.
        names: of the adapters.
        trains: whether they begin to train; else nothing of them does.
    """
    tuner: Any = model.base_model
    # The tuner remembers what it is given, and PEFT writes one name where it is given one.
    tuner.set_adapter(list(names) if len(names) > 1 else names[0], inference_mode=not trains)


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and layer of every layer that an adapter acts through."""
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module


def copied_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Parameters of copies that train whole or in rows, in place of a layer or of some of its rows."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield from module.parameters()


def switch_layers(model: nn.Module, *, on: bool) -> None:
    """Switch every layer that adapters have been put into, as `PeftModel.disable_adapter` does."""
    for module in model.modules():
        if isinstance(module, ADDED):
            module.enable_adapters(enabled=on)


def injected_configs(model: nn.Module) -> dict[str, Any]:
    """Name to configuration of adapters that transformers has put into a model, which then is no `PeftModel`."""
    return dict(getattr(model, "peft_config", None) or {}) if getattr(model, "_hf_peft_config_loaded", False) else {}


def adopted(model: Any) -> PeftModel:
    """A `PeftModel` around the adapters that transformers has put into a model; no tensor changes, nor what trains.

    PEFT's constructor would inject an adapter of its own, over one of the same name. `inject_adapter` is what does it,
    and everything else of the constructor is wanted.
    """
    configs, active = injected_configs(model), list(model.active_adapters())
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    first = active[0] if active else next(iter(configs))
    del model.peft_config
    model._hf_peft_config_loaded = False
    # The class for classification would train a copy of the head too.
    classifies = "ForSequenceClassification" in type(model).__name__
    kind = PeftModelForSeq2SeqLM if model.config.is_encoder_decoder else PeftModelForCausalLM
    kind = PeftModel if classifies else kind
    with _without_injection(PEFT_TYPE_TO_TUNER_MAPPING[configs[first].peft_type]):
        policy = cast(PeftModel, kind(model, configs[first], first, autocast_adapter_dtype=False))
    tuner: Any = policy.base_model
    tuner.peft_config.update(configs)
    tuner.targeted_module_names = [path for path, _ in tuner_layers(model)]
    set_active(policy, active or [first], trains=False)
    for parameter, value in required:
        parameter.requires_grad_(value)
    return policy


@contextmanager
def _without_injection(tuner: Any) -> Iterator[None]:
    own = "inject_adapter" in vars(tuner)
    before = tuner.inject_adapter
    tuner.inject_adapter = lambda *_, **__: None
    try:
        yield
    finally:
        if own:
            tuner.inject_adapter = before
        else:
            del tuner.inject_adapter


def restored_tensors(model: PeftModel, tensors: Mapping[str, Tensor], adapter: str) -> tuple[list[str], list[str]]:
    """Names of the model's tensors that PEFT would set from an adapter's file, and names that it would find no place
    for and pass over; nothing is set.

    PEFT gives keys other names by rules of each kind of adapter and hands the result to `load_state_dict`, which is
    listened to here.
    """
    found: list[str] = []

    def listen(state: Mapping[str, Tensor], **_: Any) -> Any:
        found.extend(state)
        return nn.Module.load_state_dict(model, {}, strict=False)

    config: Any = model.peft_config[adapter]
    model.load_state_dict = listen  # type: ignore[method-assign]
    encoder: Any = model.prompt_encoder[adapter].embedding if config.is_prompt_learning else None
    try:
        if encoder is not None:
            encoder.load_state_dict = lambda *_, **__: None  # of virtual tokens, which PEFT sets apart
        set_peft_model_state_dict(model, dict(tensors), adapter)
    finally:
        del model.load_state_dict
        if encoder is not None:
            del encoder.load_state_dict
    known = model.state_dict()
    virtual = [f"prompt_encoder.{adapter}.embedding.weight"] * ("prompt_embeddings" in found)
    placed = [name for name in found if name in known]
    return [*placed, *virtual], [name for name in found if name not in known and name != "prompt_embeddings"]
