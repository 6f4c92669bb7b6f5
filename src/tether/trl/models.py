"""TRL's helpers for models and tokenizers: a frozen copy, another chat template."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from tether.compat.launcher import number
from tether.errors import ConfigError
from tether.models import load_tokenizer


def create_reference_model(model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None) -> Any:
    """A frozen copy of a model, in evaluation mode; a trainer makes its own reference where none is passed.

    Raises:
        ConfigError: layers are to be shared, which would let the reference move with the policy.
    """
    if num_shared_layers is not None or pattern is not None:
        raise ConfigError(
            "create_reference_model() got num_shared_layers or pattern: layers that are shared would move with the "
            "policy. Leave them out, or pass no ref_model: under an adapter the reference needs no second model."
        )
    return copy.deepcopy(model).eval().requires_grad_(False)


def get_kbit_device_map() -> dict[str, int] | None:
    """Where a process loads quantised weights: the device of its own; None without one. Gone from TRL."""
    return {"": max(number("LOCAL_RANK", 0), 0)} if torch.accelerator.is_available() else None


def clone_chat_template(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer_path: str,
    resize_to_multiple_of: int | None = 64,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]:
    """Give a tokenizer the chat template, the tokens and the end of another one, and the model room for them.

    Args:
        model: changed in place.
        tokenizer: changed in place.
        source_tokenizer_path: folder or hub name of the other tokenizer.
        resize_to_multiple_of: embeddings become a multiple of it, and the vocabulary is filled up; None: neither.

    Returns:
        Model, tokenizer, and the ids of the tokens that are new.
    """
    source = load_tokenizer(source_tokenizer_path)
    tokenizer.chat_template = source.get_chat_template()
    known = tokenizer.get_vocab()
    new = [token for token in source.added_tokens_decoder.values() if token.content not in known]
    tokenizer.add_tokens(new)
    tokenizer.eos_token = source.eos_token
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.resize_token_embeddings(len(tokenizer.get_vocab()), pad_to_multiple_of=resize_to_multiple_of)
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    number = 0
    while len(tokenizer.get_vocab()) < rows:
        filler = AddedToken(f"<extra_id_{number}>")
        number += 1
        new += [filler] * tokenizer.add_tokens(filler)
    return model, tokenizer, [tokenizer.get_vocab()[token.content] for token in new]


def get_training_chat_template(processing_class: Any = None, tokenizer: Any = None) -> None:
    """None, which says that the template can be trained with as it is: turns are found without marks in it."""
    if processing_class is None and tokenizer is None:
        raise ConfigError("get_training_chat_template() got no tokenizer. Pass one as processing_class.")
