"""A model without weights: what its code says of itself, and a rehearsal of what a run will do with it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from tether.errors import ConfigError
from tether.models.adapters import kind_of, refuse_unfit_virtual_tokens

_CLASSES = (
    (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM),
    (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
)


def blueprint(config: Any) -> PreTrainedModel | None:
    """The model of a configuration without weights, on the device `meta`; None where transformers cannot build one.

    Raises:
        ConfigError: it describes none, with what the model's code said of it.
    """
    for known, kind in _CLASSES:
        if type(config) in known:
            try:
                with torch.device("meta"):
                    return kind.from_config(config)
            except (MemoryError, RecursionError, ImportError):
                raise
            except Exception as error:  # whatever the code of a model makes of values that it did not expect
                raise ConfigError(
                    f"The model's configuration ({type(config).__name__}) describes none that can be built: "
                    f"{type(error).__name__}: {' '.join(str(error).split())} Correct its config.json."
                ) from error
    return None


def rehearse(config: PeftConfig, model_config: Any) -> None:
    """Put an adapter on a model without weights and call it there, so that what cannot work is known before any load.

    Args:
        config: of the adapter.
        model_config: of the model.

    Raises:
        ConfigError: PEFT cannot put it there, or the model cannot be called with token ids alone with it.
    """
    refuse_unfit_virtual_tokens(config, model_config)
    # PEFT would say "`use_cache` must be False", which changes nothing.
    if getattr(config, "adapters", None) == {}:
        raise ConfigError(
            f"A {kind_of(config)} adapter mixes adapters that were trained before, and its `adapters` names none. Give "
            "their folders by name, or train one adapter, such as LoRA."
        )
    model = blueprint(model_config)
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        if model is None:
            return
        model.set_attn_implementation("eager")  # others ask for values of the mask
        model(**inputs)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, KeyError, AttributeError):
        return  # it needs values; then the weights' own call will tell
    copied = copy.deepcopy(config)
    copied.task_type = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again when it is put on the weights
            with torch.device("meta"):
                adapted = get_peft_model(model, copied)
            adapted(**inputs)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"PEFT cannot put this {kind_of(config)} adapter on {type(model).__name__}, or call it with token ids "
            f"alone: {' '.join(str(error).split())}"
        ) from error
    except (RuntimeError, NotImplementedError, KeyError, AttributeError):
        return  # an initialisation that needs values, such as PiSSA's
