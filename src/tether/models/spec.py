"""How a model is loaded, in one value: for the policy, for `tether doctor`, and for whoever loads one in a script."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from tether.errors import ConfigError
from tether.models.adapters import Folders, adapter_folders, continue_adapter
from tether.models.load import (
    check_source,
    is_adapter,
    load_config,
    load_policy,
    load_processing,
    load_tokenizer,
    refuse_cutting,
)
from tether.models.quantized import is_quantized, quantization_config
from tether.models.structure import adapter_tensors, transformers_model, unwrap

logger = logging.getLogger("tether")
_NAMES = {"attn_implementation": "attention"}
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class ModelSpec:
    """A model by name, and how it is to be loaded.

    Args:
        source: hub name, folder, folder of an adapter, or `.gguf` file.
        revision: branch, tag or commit of a hub name.
        dtype: of the weights, see `load_policy`.
        quantization: see `quantization_config`; an adapter then trains on frozen weights.
        device_map: where the weights go, in transformers' words: a device, `auto`, or a mapping; its default if None.
        attention: attention implementation of transformers; its default if None.
        trust_remote_code: run Python code that the model's repository brings.
        tokenizer: hub name or folder of another tokenizer than the model's own.
        adapter: folder of an adapter on the model: it goes on training, or is frozen beneath a new one; of several,
            each on those before it, the last one does.
        processor: keywords for the processor of a model that sees images.
        further: other keywords of `from_pretrained`.

    Raises:
        ConfigError: a quantisation that is unknown, or of which the library is missing; an adapter that is not there; a
            device that does not exist.

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
    tokenizer: str | Path | None = None
    adapter: Folders | None = None
    processor: Mapping[str, Any] = field(default_factory=dict)
    further: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.quantization is not None:
            if "quantization_config" in self.further:
                raise ConfigError("quantization and quantization_config were given together; leave one of them out.")
            quantization_config(self.quantization, self.dtype)
        refuse_cutting(self.further)
        _check_device(self.device_map)
        for adapter in self.adapters:
            self._check_adapter(adapter)

    @property
    def adapters(self) -> list[Path]:
        """Folders of the adapters on the model, the undermost first."""
        return [] if self.adapter is None else adapter_folders(self.adapter)

    def _check_adapter(self, adapter: Path) -> None:
        if not is_adapter(adapter):
            raise ConfigError(
                f"adapter is '{adapter}', which is not a folder with adapter_config.json. Give the folder that an "
                "adapter was saved in."
            )
        check_source(adapter)
        if is_adapter(self.source):
            raise ConfigError(
                f"The model '{self.source}' is an adapter's folder and adapter names another, '{adapter}'. Name the "
                "model that they are on, or leave adapter out to continue the first."
            )

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are quantised when they are loaded, so that they cannot train themselves."""
        return self.quantization not in (None, "none") or self.further.get("quantization_config") is not None

    @property
    def brings_adapter(self) -> bool:
        """Whether the model comes with an adapter."""
        return self.adapter is not None or is_adapter(self.source)

    @classmethod
    def of(cls, source: str | Path, options: Mapping[str, Any], *, trust_remote_code: bool = False) -> ModelSpec:
        """From the keywords of `model_init_kwargs`; what is no field of this class goes to `from_pretrained`."""
        named = {_NAMES.get(name, name): value for name, value in options.items()}
        own = {name: named.pop(name) for name in list(named) if name in cls.__dataclass_fields__}
        return cls(source, **{"trust_remote_code": trust_remote_code, **own}, further=named)

    def require_device(self) -> None:
        """Refuse a device that torch has not got here, before anything is read.

        Raises:
            ConfigError: with torch's own words.
        """
        if not isinstance(self.device_map, str) or self.device_map in _SPREAD:
            return
        try:
            torch.empty(1, device=self.device_map)
        except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
            said = str(error).strip().splitlines()[0].partition(". ")[0]
            raise ConfigError(
                f"device_map is {self.device_map!r}, a device on which torch cannot compute here ({said}). In a run "
                "file it is `model.device`: set it to cpu or a device that this machine has, or leave it out."
            ) from error

    def load(self) -> PreTrainedModel | PeftModel:
        """The model with its adapter, which goes on training; see `load_policy` for the errors."""
        model = self.load_base()
        return model if self.adapter is None else continue_adapter(cast(PreTrainedModel, model), self.adapter)

    def load_base(self) -> PreTrainedModel | PeftModel:
        """The model without `adapter`; see `load_policy` for the errors."""
        return load_policy(self.source, **self.options())

    def options(self) -> dict[str, Any]:
        """Keywords of `load_policy`."""
        options = dict(self.further)
        if self.quantization not in (None, "none"):
            options["quantization_config"] = quantization_config(str(self.quantization), self.dtype)
        if self.device_map is not None:
            options["device_map"] = self.device_map
        return {
            "dtype": self.dtype,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "attn_implementation": self.attention,
            **options,
        }

    def load_config(self) -> Any:
        """Its configuration alone; no weights are read."""
        return load_config(self.source, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def load_processing(self) -> PreTrainedTokenizerBase | ProcessorMixin:
        """Its tokenizer, or its processor where it sees images; or the other tokenizer that was named.

        Raises:
            ConfigError: there is none, or the other one has ids that the model has no embeddings for.
        """
        if self.tokenizer is None:
            return load_processing(
                self.source, revision=self.revision, trust_remote_code=self.trust_remote_code, **self.processor
            )
        if self.processor:
            raise ConfigError("processor and tokenizer were given together; a processor has its own. Leave one out.")
        tokenizer = load_tokenizer(self.tokenizer, trust_remote_code=self.trust_remote_code)
        rows = self.load_config().get_text_config().vocab_size
        largest = max(tokenizer.get_vocab().values())
        if largest >= rows:
            raise ConfigError(
                f"tokenizer is '{self.tokenizer}', with ids up to {largest}, and the model '{self.source}' has "
                f"{rows} embeddings: it belongs to another model. Leave tokenizer out, or name one with the model's "
                "ids; new tokens go in add_tokens."
            )
        return tokenizer


def _check_device(device_map: Any) -> None:
    """Say that a device does not exist before anything is read."""
    if not isinstance(device_map, str) or device_map in _SPREAD:
        return
    try:
        known = torch.device(device_map).type != "meta"  # weights there have no values
    except RuntimeError:
        known = False
    if not known:
        raise ConfigError(
            f"device_map is {device_map!r}; allowed are {', '.join(_SPREAD)}, a device such as cpu or cuda:1, or a "
            "mapping of modules to devices."
        )


def refuse_spread(device_map: Any, processes: int) -> None:
    """Refuse, before anything is read, a mapping of a model to places of which some cannot train, or not here.

    Raises:
        ConfigError: which places, and what to do.
    """
    places = sorted({str(place) for place in device_map.values()}) if isinstance(device_map, Mapping) else []
    if away := [place for place in places if place in ("disk", "meta")]:
        raise ConfigError(
            f"device_map puts a part of the model on {away[0]}, where weights cannot be trained. Name devices that "
            "hold all of it, quantise it, or shard it with FSDP."
        )
    if processes > 1 and (len(places) > 1 or device_map in _SPREAD):
        raise ConfigError(
            f"device_map is {device_map!r}, which spreads the model over several devices, and the run has {processes} "
            "processes, each of which would want all of them. Run one process, or leave device_map out, or shard the "
            "model with FSDP."
        )


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


SPECIAL_TOKENS = ("bos_token", "cls_token", "eos_token", "mask_token", "pad_token", "sep_token", "unk_token")


def check_special_tokens(tokens: Mapping[str, str] | None) -> None:
    """Refuse what is no special token of a tokenizer.

    Raises:
        ConfigError: an unknown name, or a token that is not text.
    """
    for name, token in (tokens or {}).items():
        if name not in SPECIAL_TOKENS or not isinstance(token, str) or not token:
            raise ConfigError(
                f"has {name!r}: {token!r}; allowed are {', '.join(SPECIAL_TOKENS)}, each with the text of a token. "
                "Other tokens go in add_tokens.",
                "special_tokens",
            )


def use_tokens(tokenizer: PreTrainedTokenizerBase, new: Iterable[str], special: Mapping[str, str] | None) -> list[int]:
    """Add tokens to a tokenizer, and set its special ones, of which those that it lacks are added too.

    Args:
        tokenizer: changed in place.
        new: see `add_tokens`.
        special: name in `SPECIAL_TOKENS` to its text.

    Returns:
        The ids of all that are new.
    """
    wanted, known = list(new), tokenizer.get_vocab()
    lacking = [token for token in dict.fromkeys((special or {}).values()) if token not in known and token not in wanted]
    ids = add_tokens(tokenizer, [*wanted, *lacking])
    for name, token in (special or {}).items():
        setattr(tokenizer, name, token)
    return ids


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
            chosen = [pattern for pattern in train if id(parameter) in found[pattern]]
            if chosen and is_quantized(parameter):
                raise ConfigError(
                    f"{chosen[0]!r} finds {names[id(parameter)][0]!r}, a quantised weight, which cannot train. Choose "
                    "parameters that are not quantised, such as norms."
                )
            parameter.requires_grad_(bool(chosen))
        if any(id(parameter) in found[pattern] for pattern in freeze):
            parameter.requires_grad_(False)


def _found(pattern: str, names: dict[int, list[str]]) -> set[int]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{pattern!r} is not a regular expression ({error}); give one, such as 'layers\\.1\\.'."
        ) from None
    found = {key for key, own in names.items() if any(map(expression.search, own))}
    if not found:
        every = [name for own in names.values() for name in own]
        near = get_close_matches(pattern, every, n=1, cutoff=0.3) or every[:1]
        raise ConfigError(f"No parameter has {pattern!r} in its name; there is {near[0]!r}, for example. Correct it.")
    return found
