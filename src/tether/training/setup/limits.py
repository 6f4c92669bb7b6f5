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
from tether.models.adapting.adapter_files import adapter_config
from tether.models.before.limits import Limits
from tether.models.spec import ModelSpec
from tether.models.structure import adapter_configs, transformers_model
from tether.training.config import PreferenceConfig
from tether.training.setup.policy import policy_spec
from tether.training.setup.reference import reference_model_spec

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
    if isinstance(model, nn.Module):
        configs: list[Any] = [peft_config, *adapter_configs(model).values()]
        return _of_loaded(config, model, new, _virtual(configs))
    spec = policy_spec(model, args)
    return _of_named(config, spec, new, _virtual([peft_config, *_saved_adapter(spec)]))


def reference_limits(ref_model: str | Path | nn.Module | None, args: PreferenceConfig) -> list[Limits]:
    """What the rows of a run may be at most for another model that is the reference; none without one."""
    if ref_model is None or not args.needs_reference:
        return []
    if isinstance(ref_model, nn.Module):
        configs = list(adapter_configs(ref_model).values())
        return [_of_loaded(transformers_model(ref_model).config, ref_model, [], _virtual(configs))]
    spec = reference_model_spec(args, str(ref_model))
    return [_of_named(spec.load_config(), spec, [], _virtual(_saved_adapter(spec)))]


def _of_loaded(config: Any, model: nn.Module, new: list[int], virtual: int) -> Limits:
    inner = transformers_model(model)
    embeddings: Any = inner.get_input_embeddings()
    return Limits(config, inner, _with_new(getattr(embeddings, "num_embeddings", None), new), virtual)


def _of_named(config: Any, spec: ModelSpec, new: list[int], virtual: int) -> Limits:
    # An adapter may bring embeddings of its own for more tokens.
    rows = None if spec.brings_adapter else _with_new(config.get_text_config().vocab_size, new)
    return Limits(config, None, rows, virtual)


def _saved_adapter(spec: ModelSpec) -> list[Any]:
    return [adapter_config(folder) for folder in spec.adapters or [spec.source]] if spec.brings_adapter else []


def _virtual(configs: list[Any]) -> int:
    return max((getattr(config, "num_virtual_tokens", None) or 0 for config in configs), default=0)


def _with_new(rows: int | None, new: list[int]) -> int | None:
    return None if rows is None else max([rows, *(number + 1 for number in new)])


def checked(limits: Limits, others: list[Limits], *, apart: bool) -> Check:
    """Refuses prepared rows that a model cannot compute, by their table and the name of their set.

    Args:
        limits: of the policy.
        others: of the reference, where it is another model.
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
        if problem := limits.problem(tokens, largest):
            raise DataError(f"{name}: {problem}.")
        for other in others:
            if problem := other.problem(tokens, largest):
                raise DataError(f"{name}: for the reference model, {problem}.")

    return check
