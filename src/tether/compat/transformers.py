"""Places of transformers' models and configurations that it does not document; read in transformers 5.23.0."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as integration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

# peft 0.21 and accelerate 1.15 use names that transformers 5.23 renames, and TRL's configurations have them: whoever
# trains can change nothing about it.
warnings.filterwarnings(
    "ignore", message=".*gradient_checkpointing.* is deprecated and will be removed in v6", category=FutureWarning
)
# Entries of a configuration that say where a model came from and how it is run, not what it computes.
PRIVATE_CONFIG = frozenset(
    {"_attn_implementation", "_attn_implementation_autoset", "_model_name_or_path", "_name_or_path"}
)


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, transformers and the hub show no bars of their own: they write carriage returns also into a log file."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def attention_of(model: PreTrainedModel) -> str | None:
    """The attention implementation of the layers that read tokens; it can be set by a method, and not be asked for."""
    return model.config.get_text_config()._attn_implementation


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention of the layers that read tokens; a vision tower keeps its own.

    `set_attn_implementation` takes parts of a model by the names that `sub_configs` lists.
    """
    text = model.config.get_text_config()
    own = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is text), None)
    model.set_attn_implementation(name if own is None else {own: name})


def registered_attention(name: str) -> Callable[..., Any]:
    """The function behind an attention implementation; `AttentionInterface` registers, and only this table looks up."""
    return ALL_ATTENTION_FUNCTIONS[name]


def registered_mask(name: str) -> Callable[..., Any]:
    """The function that makes the masks of an attention implementation, see `registered_attention`."""
    return ALL_MASK_ATTENTION_FUNCTIONS[name]


def eager_attention(layer: nn.Module) -> Callable[..., Any] | None:
    """The eager function of a layer's architecture, which stands in the architecture's own file and in no table."""
    return getattr(sys.modules[type(layer).__module__], "eager_attention_forward", None)


def carries_state(model: PreTrainedModel) -> bool:
    """Whether a model carries a state along the row, as Mamba does; nothing public says so."""
    return model._is_stateful


def kept_in_float32(model: PreTrainedModel) -> list[str]:
    """Modules that loading leaves in float32, whatever dtype is asked for."""
    return sorted(model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict or ())


def commit_of(model: PreTrainedModel) -> str | None:
    """The hub's commit that a model was loaded from; None for one from a folder."""
    return getattr(model.config, "_commit_hash", None)


def is_quantized(model: nn.Module) -> bool:
    """Whether a model was loaded with quantised weights, which a quantizer notes on it."""
    return getattr(model, "is_quantized", False)


def logits_bias(model: PreTrainedModel) -> Tensor | None:
    """What BART and similar add to the logits outside their head; a buffer of the model, which no method returns."""
    return getattr(model, "final_logits_bias", None)


def image_positions(model: PreTrainedModel) -> Callable[..., Any] | None:
    """What counts positions by time, height and width (Qwen2-VL and similar); None for models that do not.

    A forward does it for itself, by its padded rows; a packed row needs it for each prompt.
    """
    return getattr(model.base_model, "get_rope_index", None)


def router_loss(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """The load-balancing loss of router logits and `attention_mask`; None where the architecture has none.

    It stands in the file of the architecture, or of the one that it derives from. A forward returns it for its own
    rows, and a packed row counts some tokens more than once.
    """
    modules = [sys.modules[kind.__module__] for kind in type(model).__mro__]
    function: Any = next((found for m in modules if (found := getattr(m, "load_balancing_loss_func", None))), None)
    experts, chosen = getattr(model, "num_experts", None), getattr(model, "num_experts_per_tok", None)
    if function is None or experts is None or chosen is None:
        return None
    return lambda logits, attention_mask: function(logits, experts, chosen, attention_mask=attention_mask)


@contextmanager
def loading_whole() -> Iterator[None]:
    """Inside, models are loaded and made whole, also while there is a DeepSpeed configuration with stage 3.

    The configuration is a variable of the module: `unset_hf_deepspeed_config` clears it, and nothing public gives it
    back. Making an accelerator inside sets it again, to the same with its numbers filled in.
    """
    settings = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if integration._hf_deepspeed_config_weak_ref is None:
            integration._hf_deepspeed_config_weak_ref = settings
