"""How a model is loaded, in one value: for the policy, for `tether doctor`, and for whoever loads one in a script."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from tether.errors import ConfigError
from tether.models.load import load_config, load_policy, load_processing
from tether.models.quantized import quantization_config
from tether.models.structure import adapter_tensors, transformers_model, unwrap

logger = logging.getLogger("tether")
_NAMES = {"attn_implementation": "attention"}


@dataclass(frozen=True)
class ModelSpec:
    """A model by name, and how it is to be loaded.

    Args:
        source: hub name, folder, folder of an adapter, or `.gguf` file.
        revision: branch, tag or commit of a hub name.
        dtype: of the weights, see `load_policy`.
        quantization: `4bit` (NF4) or `8bit`, by bitsandbytes; an adapter then trains on frozen weights.
        device_map: where the weights go; transformers' default if None.
        attention: attention implementation of transformers; its default if None.
        trust_remote_code: run Python code that the model's repository brings.
        further: other keywords of `from_pretrained`.

    Raises:
        ConfigError: a quantisation that is unknown, or of which the library is missing.

    Example:
        >>> ModelSpec.of("tiny", {"dtype": "float32", "attn_implementation": "eager"}).attention
        'eager'
    """

    source: str | Path
    revision: str | None = None
    dtype: str | torch.dtype = "auto"
    quantization: str | None = None
    device_map: Any = None
    attention: str | None = None
    trust_remote_code: bool = False
    further: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.quantization is not None:
            if "quantization_config" in self.further:
                raise ConfigError("quantization and quantization_config came together; leave one of them out.")
            quantization_config(self.quantization, self.dtype)

    @classmethod
    def of(cls, source: str | Path, options: Mapping[str, Any], *, trust_remote_code: bool = False) -> ModelSpec:
        """From the keywords of `model_init_kwargs`; what is no field of this class goes to `from_pretrained`."""
        named = {_NAMES.get(name, name): value for name, value in options.items()}
        own = {name: named.pop(name) for name in list(named) if name in cls.__dataclass_fields__}
        return cls(source, **{"trust_remote_code": trust_remote_code, **own}, further=named)

    def load(self) -> PreTrainedModel | PeftModel:
        """The model; see `load_policy` for the errors."""
        options = dict(self.further)
        if self.quantization is not None:
            options["quantization_config"] = quantization_config(self.quantization, self.dtype)
        if self.device_map is not None:
            options["device_map"] = self.device_map
        return load_policy(
            self.source,
            dtype=self.dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            attn_implementation=self.attention,
            **options,
        )

    def load_config(self) -> Any:
        """Its configuration alone; no weights are read."""
        return load_config(self.source, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def load_processing(self) -> PreTrainedTokenizerBase | ProcessorMixin:
        """Its tokenizer, or its processor where it sees images."""
        return load_processing(self.source, revision=self.revision, trust_remote_code=self.trust_remote_code)


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> list[int]:
    """Add tokens to a tokenizer, each of them never split.

    Args:
        tokenizer: changed in place.
        tokens: their texts.

    Returns:
        Their ids.

    Raises:
        ConfigError: a token that the tokenizer has already, which would be trained as if it were new.
    """
    wanted = list(tokens)
    known = [token for token in wanted if token in tokenizer.get_vocab()]
    if known:
        raise ConfigError(f"add_tokens: the tokenizer has {known[0]!r} already. Leave it out.")
    tokenizer.add_tokens(wanted)
    return [tokenizer.get_vocab()[token] for token in wanted]


def embed_tokens(model: nn.Module, ids: list[int]) -> None:
    """Make room for new tokens, and let each begin as the mean of all that were there before.

    Args:
        model: changed in place; without an adapter, whose tensors would have the wrong shape.
        ids: of the new tokens.

    Raises:
        ConfigError: the model has an adapter.
    """
    if not ids:
        return
    if isinstance(unwrap(model), PeftModel):
        raise ConfigError("add_tokens: the model has an adapter already. Merge it first, or add tokens to its base.")
    base = transformers_model(model)
    before = min(ids)
    rows = base.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    if max(ids) >= rows:
        base.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for module in (base.get_input_embeddings(), base.get_output_embeddings()):
            for name in ("weight", "bias"):
                tensor = getattr(module, name, None)
                if tensor is not None:
                    tensor[ids] = tensor[:before].float().mean(0).to(tensor.dtype)
    logger.info(f"vocabulary: {len(ids)} tokens added, which begin as the mean of the {before} that were there")


def select_trainable(model: nn.Module, train: Iterable[str], freeze: Iterable[str]) -> None:
    """Partial fine-tuning: which parameters train, by regular expressions that are searched for in their names.

    Args:
        model: changed in place.
        train: only what one of these finds trains, and an adapter's tensors; empty: all that did before.
        freeze: what one of these finds does not train.

    Raises:
        ConfigError: an expression that finds nothing, or is none.
    """
    train, freeze = list(train), list(freeze)
    names: dict[int, list[str]] = {}
    parameters = list(unwrap(model).named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        names.setdefault(id(parameter), []).append(name)
    found = {pattern: _found(pattern, names) for pattern in (*train, *freeze)}
    adapter = {id(tensor) for tensor in adapter_tensors(model).values()}
    for _, parameter in parameters:
        if train and id(parameter) not in adapter:
            parameter.requires_grad_(any(id(parameter) in found[pattern] for pattern in train))
        if any(id(parameter) in found[pattern] for pattern in freeze):
            parameter.requires_grad_(False)


def _found(pattern: str, names: dict[int, list[str]]) -> set[int]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{pattern!r} is no regular expression ({error}); give one, such as 'layers\\.1\\.'."
        ) from None
    found = {key for key, own in names.items() if any(map(expression.search, own))}
    if not found:
        every = [name for own in names.values() for name in own]
        near = get_close_matches(pattern, every, n=1, cutoff=0.3) or every[:1]
        raise ConfigError(f"No parameter has {pattern!r} in its name; there is {near[0]!r}, for example. Correct it.")
    return found
