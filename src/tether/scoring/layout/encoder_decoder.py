"""The layout of encoder-decoder models (T5, BART): each prompt is encoded once, its completions are decoded beside each
other.

A prompt is what the encoder reads; a completion is what the decoder writes after its start token, so the first
completion token is predicted from that token and not from the prompt's end. The model is called once, through its own
forward: hooks on the encoder give it the B prompts, and what it returns is repeated for the K completions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from tether.errors import ScoringError
from tether.types import ScoringBatch


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether a model reads the prompt in an encoder and writes the completion in a decoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def encoder_decoder(model: PreTrainedModel, batch: ScoringBatch) -> tuple[dict[str, Any], Tensor, Any]:
    """What to call the model with, where in the `[K * width]` decoder positions the scored tokens are predicted, and
    the context to call it in.

    Raises:
        ScoringError: the model has no encoder, or does not say which token its decoder starts with.
    """
    if not is_encoder_decoder(model):
        raise ScoringError(f"{type(model).__name__} has no encoder apart from its decoder")
    prompts, completions, owner = _parts(batch)
    ids, mask = _padded(prompts)
    start = torch.full_like(completions[0][:1], start_token(model))
    decoder_ids, _ = _padded([torch.cat([start, completion[:-1]]) for completion in completions])
    sources = batch.completion_index * decoder_ids.shape[1] + _steps(batch, owner)
    inputs = {"input_ids": ids, "attention_mask": mask[owner], "decoder_input_ids": decoder_ids}
    return inputs, sources, _encode_once(model, mask, owner)


def logits_alone(model: nn.Module, config: PreTrainedModel, batch: ScoringBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """For each completion, from a forward of its own: the logits of its scored tokens, and those tokens.

    Args:
        model: the model, wrapped or not.
        config: the transformers model inside it.
        batch: prompts and completions.
    """
    prompts, completions, owner = _parts(batch)
    steps = _steps(batch, owner)
    for k, completion in enumerate(completions):
        prompt = prompts[int(owner[k])][None]
        start = torch.full_like(completion[:1], start_token(config))
        logits = model(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            decoder_input_ids=torch.cat([start, completion[:-1]])[None],
            use_cache=False,
        ).logits[0]
        where = steps[batch.completion_index == k]
        yield logits[where], completion[where]


def start_token(model: PreTrainedModel) -> int:
    """The token that the decoder begins with."""
    for config in (model.config, model.generation_config):
        token = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise ScoringError(
        f"{type(model).__name__} does not say which token its decoder starts with; set "
        "model.config.decoder_start_token_id (T5: the padding token, BART: the end token)."
    )


def _parts(batch: ScoringBatch) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The distinct prompts, the K completions, and for each completion the number of its prompt."""
    row, spans = batch.input_ids[0], [tree.spans() for tree in batch.forest.trees]
    prompts = [row[slice(*trunk)] for trunk, *_ in spans]
    if not all(map(len, prompts)):
        raise ScoringError("A prompt is empty, and an encoder needs a token to read. Give the rows prompts.")
    completions = [row[slice(*spans[tree][branch + 1])] for tree, branch in batch.branches]
    return prompts, completions, torch.tensor([tree for tree, _ in batch.branches], device=row.device)


def _steps(batch: ScoringBatch, owner: Tensor) -> Tensor:
    """For each scored token, which token of its completion it is, from 0: int64 `[N]`."""
    trunks = torch.tensor([tree.trunk for tree in batch.forest.trees], device=owner.device)
    # A token's position in the tree counts its prompt; its predictor stands one before it.
    return batch.position_ids[0, batch.sources] + 1 - trunks[owner][batch.completion_index]


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows side by side, padded on the right, and a mask that is 1 where a token is."""
    width = max(len(row) for row in rows)
    ids = rows[0].new_zeros(len(rows), width)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


@contextmanager
def _encode_once(model: PreTrainedModel, mask: Tensor, owner: Tensor) -> Iterator[None]:
    """Inside, the encoder reads B prompts under their `mask [B, P]`, and the decoder sees K of them."""
    encoder: Any = model.get_encoder()

    def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if args or "attention_mask" not in kwargs:
            raise ScoringError(f"{type(module).__name__} is not given its mask by name, so prompts cannot be shared")
        return args, {**kwargs, "attention_mask": mask}

    def repeat(module: nn.Module, args: Any, kwargs: Any, output: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=output[0].index_select(0, owner))

    handles = [
        encoder.register_forward_pre_hook(narrow, with_kwargs=True),
        encoder.register_forward_hook(repeat, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
