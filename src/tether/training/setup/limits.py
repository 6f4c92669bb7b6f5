"""Prepared rows against what the model can compute, before its weights are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from peft import PeftConfig
from torch import nn

from tether.data.prepare.table import lengths_of, pieces
from tether.errors import DataError
from tether.models.before.limits import Limits
from tether.models.structure import transformers_model
from tether.training.config import PreferenceConfig
from tether.training.setup.policy import policy_spec

Check = Callable[[str, pa.Table], None]


def limits_of(
    model: str | Path | nn.Module, config: Any, args: PreferenceConfig, new: list[int], peft_config: PeftConfig | None
) -> Limits:
    """What the rows of a run may be at most.

    Args:
        model: the policy, or its name.
        config: its configuration.
        args: of the run.
        new: ids of the tokens that the run adds.
        peft_config: of a new adapter.
    """
    virtual = getattr(peft_config, "num_virtual_tokens", None) or 0
    if isinstance(model, nn.Module):
        inner = transformers_model(model)
        embeddings: Any = inner.get_input_embeddings()
        rows = getattr(embeddings, "num_embeddings", None)
        return Limits(config, inner, _with_new(rows, new), virtual)
    # An adapter may bring embeddings of its own for more tokens.
    brings = policy_spec(model, args).brings_adapter
    return Limits(config, None, None if brings else _with_new(config.get_text_config().vocab_size, new), virtual)


def _with_new(rows: int | None, new: list[int]) -> int | None:
    return None if rows is None else max([rows, *(number + 1 for number in new)])


def checked(limits: Limits, *, apart: bool) -> Check:
    """Refuses prepared rows that the model cannot compute, by their table and the name of their set.

    Args:
        limits: of the model.
        apart: whether the model reads prompts and completions in two parts, an encoder and a decoder.
    """

    def check(name: str, table: pa.Table) -> None:
        if not len(table):
            return
        tokens = largest = 0
        for piece in pieces(table):
            prompts, completions = lengths_of(piece)
            longest = [max(lengths, default=0) for lengths in completions]
            pairs = zip(prompts.tolist(), longest, strict=True)
            tokens = max(tokens, *(max(pair) if apart else sum(pair) for pair in pairs))
            ids = [
                piece["prompt_ids"].combine_chunks().flatten(),
                piece["completion_ids"].combine_chunks().flatten().flatten(),
            ]
            largest = max(largest, *(int(part.to_numpy(zero_copy_only=False).max(initial=0)) for part in ids))
        problem = limits.problem(tokens, largest)
        if problem:
            raise DataError(f"{name}: {problem}.")

    return check
