"""How long a row may be and which ids it may have, by a model's configuration: known before its weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tether.models.before.blueprint import blueprint
from tether.models.structure import transformers_model

# Rotary embeddings whose factors come from the longest row of a forward, so that rows would change each other.
_BY_LENGTH = ("longrope", "dynamic")
# Rows of a position table that come before position 0: OPT and BART have 2.
_BEFORE = 4


def rotary_limit(config: Any) -> tuple[int, str] | None:
    """Tokens up to which a rotary embedding is the same for every row of a forward, with its type; None: always is."""
    text = config.get_text_config()
    found = [
        (rope.get("original_max_position_embeddings") or text.max_position_embeddings, rope["rope_type"])
        for rope in _ropes(getattr(text, "rope_parameters", None) or {})
        if rope.get("rope_type") in _BY_LENGTH
    ]
    return min(found, default=None)


def _ropes(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One set of rotary parameters, or one for each type of layer."""
    if "rope_type" in parameters:
        yield parameters
    for value in parameters.values():
        if isinstance(value, dict):
            yield from _ropes(value)


def position_table(model: PreTrainedModel) -> int | None:
    """Positions that a model has a table for, so that a longer row would read past its end; None without a table.

    Found by its shape: an embedding that is not of tokens, or a buffer, with as many rows as the configuration says.
    """
    declared = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(declared, int):
        return None
    tokens = {id(model.get_input_embeddings())}
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in tokens]
    # Sinusoids that are made anew where a row is longer have a method for it.
    fixed = [module for module in model.modules() if not hasattr(module, "make_weights")]
    tables += [one.shape[-2] for module in fixed for one in module.buffers(recurse=False) if one.dim() >= 2]
    return declared if any(declared <= rows <= declared + _BEFORE for rows in tables) else None


@dataclass
class Limits:
    """What the rows of a run may be at most.

    Args:
        config: of the model.
        model: the model itself where it is in memory.
        vocabulary: embeddings that it will have; None: not known before it is loaded.
        virtual: virtual tokens that an adapter puts before each row.
    """

    config: Any
    model: nn.Module | None
    vocabulary: int | None
    virtual: int = field(default=0)

    @cached_property
    def rotary(self) -> tuple[int, str] | None:
        """See `rotary_limit`."""
        return rotary_limit(self.config)

    @cached_property
    def built(self) -> PreTrainedModel | None:
        """The model, without weights where it is not loaded yet; None where it cannot be built."""
        return blueprint(self.config) if self.model is None else transformers_model(self.model)

    @cached_property
    def table(self) -> int | None:
        """See `position_table`."""
        return None if self.built is None else position_table(self.built)

    def problem(self, tokens: int, largest: int) -> str:
        """Why rows of at most so many tokens, and ids up to `largest`, do not fit, and what to do; empty if they do.

        Args:
            tokens: of the longest sequence that the model computes at once.
            largest: of all ids.
        """
        declared = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        whole = tokens + self.virtual
        beside = f" and {self.virtual} virtual ones before them" if self.virtual else ""
        kind = type(self.config).__name__.removesuffix("Config")
        # A model is built to look for a table only if there is something to find.
        if isinstance(declared, int) and whole > declared and self.table is not None:
            return (
                f"the longest sequence has {tokens} tokens{beside}, and {kind} has a table of {self.table} positions. "
                f"Set max_length to {self.table - self.virtual} or less"
            )
        if self.rotary is not None and whole > self.rotary[0]:
            limit, name = self.rotary
            return (
                f"the longest sequence has {tokens} tokens{beside}, and {kind} changes its rotary embedding ({name}) "
                f"for every row of a forward beyond {limit}. Set max_length to {limit - self.virtual} or less"
            )
        if self.vocabulary is not None and largest >= self.vocabulary:
            return (
                f"the rows have the token id {largest}, and {kind} has {self.vocabulary} embeddings: the tokenizer "
                "belongs to another model, or has tokens that the model lacks. Take the model's own tokenizer; new "
                "tokens go in add_tokens"
            )
        return ""
