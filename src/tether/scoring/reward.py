"""Scores of whole completions by a reward model: one number per branch of a packed forest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.errors import ConfigError, ScoringError
from tether.models.structure import transformers_model
from tether.scoring.attention.interface import Backend, backends_for, require_all_attended
from tether.scoring.batch import sequences
from tether.scoring.layout.proof import Measures
from tether.scoring.layout.vision import has_images, images_alone
from tether.scoring.score import _LAYOUTS, Layout, _refuse_length_dependence
from tether.types import PerCompletion, ScoringBatch


def reward(
    model: nn.Module,
    batch: ScoringBatch,
    *,
    layout: Layout = "tree",
    backend: Backend | Literal["auto"] = "auto",
) -> PerCompletion:
    """Reward of every completion of a batch under a sequence classifier with one output, called `score`.

    It is read where transformers reads it: at the last token of prompt and completion that is not the padding token.
    Differentiable in the model's trainable tensors.

    Args:
        model: a transformers or PEFT model for sequence classification with `num_labels=1`, wrapped or not.
        batch: B packed prompts with K completions.
        layout: as for `score`; also `backend`.

    Returns:
        `[K]`, float32.

    Raises:
        ScoringError: the model has no head of this kind.
        ConfigError: an unknown layout.
    """
    if layout not in _LAYOUTS:
        raise ConfigError(f"reward(): layout {layout!r}; layouts are {', '.join(_LAYOUTS)}.")
    inner = transformers_model(model)
    head = require_reward_head(inner)
    _refuse_length_dependence(inner, batch)
    ends = _last_tokens(batch, inner.config.get_text_config().pad_token_id)
    index = torch.arange(batch.num_completions, device=ends.device)
    # One place of each completion is read, and no token of it predicted.
    places = {"sources": ends, "targets": batch.input_ids[0, ends], "completion_index": index, "token_values": {}}
    inputs, sources, context = _LAYOUTS[layout](inner, replace(batch, **places))
    if "forest" in inputs:
        inputs["tree_backend"] = backends_for(ends.device, gradients=False, requested=backend)[0]
    values: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, args, output: values.append(cast(Tensor, output)))
    try:
        with context as attended:
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    if attended is not None:
        require_all_attended(inner, attended)
    return values[0].flatten(0, 1).index_select(0, sources)[:, 0].float()


def reward_alone(model: nn.Module, batch: ScoringBatch) -> PerCompletion:
    """The plainest way: each sequence in a forward of its own, and the model's own output. Float32 `[K]`."""
    rows = sequences(batch)
    beside = images_alone(batch) if has_images(batch) else [{} for _ in rows]
    outputs = [
        model(input_ids=row[None], attention_mask=torch.ones_like(row)[None], use_cache=False, **images).logits[0, 0]
        for row, images in zip(rows, beside, strict=True)
    ]
    return torch.stack(outputs).float()


REWARDS = Measures(reward, reward_alone, "of a reward", "completions")


def require_reward_head(model: PreTrainedModel) -> nn.Module:
    """The head of a reward model.

    Raises:
        ScoringError: the model has no head of this kind.
    """
    head: Any = getattr(model, "score", None)
    outputs = model.config.num_labels
    if not isinstance(head, nn.Module) or outputs != 1:
        raise ScoringError(
            f"{type(model).__name__} has {outputs} outputs and {'no' if head is None else 'a'} head called `score`; "
            "a reward model needs such a head with one output. Load the model with AutoModelForSequenceClassification "
            "and num_labels=1, or name it by a string."
        )
    return head


def _last_tokens(batch: ScoringBatch, padding: int | None) -> Int[Tensor, " K"]:
    """Where in the row the last token of each sequence lies that is not `padding`: int64 `[K]`."""
    row = batch.input_ids[0]
    lengths: list[int] = []
    starts: list[int] = []  # number of each tree's trunk among all trunks and branches
    for tree in batch.forest.trees:
        starts.append(len(lengths))
        lengths += [tree.trunk, *tree.branches]
    trunks = [starts[tree] for tree, _ in batch.branches]
    branches = [starts[tree] + 1 + branch for tree, branch in batch.branches]
    places = torch.arange(len(row), device=row.device)
    places = places if padding is None else torch.where(row == padding, -1, places)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(row.device)
    last = places.new_full((len(lengths),), -1).scatter_reduce(0, owner, places, "amax")
    # A completion of nothing but padding is read at its prompt's last token; a trunk lies before its branches.
    return torch.maximum(last[branches], last[trunks]).clamp(min=0)
