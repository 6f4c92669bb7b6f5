"""Sampling by transformers' `generate`, for models that do not grow as a tree; draws are those of the tree engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tether.models.adapters import virtual_tokens
from tether.models.structure import (
    evaluation_mode,
    own_generation_settings_away,
    transformers_model,
    unwrap,
)
from tether.reference.methods.shards import gathered
from tether.rollout.records import Completion, Group, RolloutRequest, Sampling
from tether.rollout.sample import draw, seen_tokens
from tether.scoring.layout.encoder_decoder import is_encoder_decoder
from tether.scoring.layout.vision import joined_images

_Wanted = tuple[RolloutRequest, int]
# Sequences that are sampled at once.
_ROWS = 64


class TransformersEngine:
    """The embedded engine for every architecture; see `tether.rollout.records.RolloutEngine`.

    Args:
        precision: a context of the run's precision.
        rows: sequences at once.
    """

    name = "transformers"
    embedded = True

    def __init__(self, precision: Callable[[], AbstractContextManager[object]] = nullcontext, rows: int = _ROWS):
        self._precision, self._rows = precision, rows

    def generate(self, policy: nn.Module, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Group]:
        """Sample a group for each request, each completion as a padded sequence of its own."""
        wanted = [(request, branch) for request in requests for branch in request.branches]
        found: list[Completion] = []
        with gathered(policy), torch.no_grad(), evaluation_mode(policy), self._precision():
            # Virtual tokens stand before what is padded, and then further away from a prompt than they do in a score.
            for part in _parts(wanted, self._rows, even=virtual_tokens(policy) > 0):
                found += _sample(policy, part, sampling)
        completions = iter(found)
        return [Group(one, tuple(next(completions) for _ in one.branches)) for one in requests]


def _parts(wanted: Sequence[_Wanted], rows: int, *, even: bool) -> Iterator[list[_Wanted]]:
    """What is sampled at once: so many, and of prompts of one length where that is asked for."""
    part: list[_Wanted] = []
    for one in wanted:
        if part and (len(part) == rows or (even and len(one[0].prompt_ids) != len(part[0][0].prompt_ids))):
            yield part
            part = []
        part.append(one)
    if part:
        yield part


class _Draws(LogitsProcessor):
    """Leaves one token to take: the one that is drawn."""

    def __init__(self, keys: list[bytes], start: int, sampling: Sampling, prompts: list[Tensor] | None) -> None:
        self._keys, self._start, self._sampling, self._prompts = keys, start, sampling, prompts
        self._seen: Tensor | None = None
        self.logps: list[Tensor] = []
        self.kept: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        place = input_ids.shape[1] - self._start
        if self._sampling.penalises and self._seen is None:
            prompts = list(input_ids) if self._prompts is None else self._prompts
            self._seen = seen_tokens(prompts, scores.shape[1], scores.device)
        drawn = draw(scores.float() / self._sampling.temperature, self._keys, place, self._sampling, self._seen)
        self.logps.append(drawn.logps.cpu())
        if drawn.kept is not None:
            self.kept.append(drawn.kept.cpu())
        return torch.full_like(scores, -torch.inf).scatter(1, drawn.ids[:, None], 0.0)


def _sample(policy: nn.Module, wanted: list[_Wanted], sampling: Sampling) -> list[Completion]:
    inner: Any = transformers_model(policy)
    device = next(policy.parameters()).device
    prompts = [request.prompt_ids for request, _ in wanted]
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.int64), torch.zeros(len(prompts), width, dtype=torch.int64)
    # A decoder of its own begins after its start token, and what an encoder reads begins at its first place.
    encodes = is_encoder_decoder(inner)
    start = 1 if encodes else width
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if encodes else slice(width - len(prompt), width)
        ids[row, place], mask[row, place] = prompt, 1
    # As transformers has it, the penalty of a decoder of its own is of what the decoder is given.
    keys = [request.key(branch, sampling.seed) for request, branch in wanted]
    draws = _Draws(keys, start, sampling, None if encodes else prompts)
    # All settings that change what is sampled, so that none comes from the checkpoint's own generation settings.
    starts = {name: getattr(inner.config, name, None) for name in ("decoder_start_token_id", "bos_token_id")}
    config = GenerationConfig(
        **{name: value for name, value in starts.items() if value is not None},
        do_sample=False,
        num_beams=1,
        max_new_tokens=sampling.max_tokens,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=list(sampling.stop_ids) or None,
        pad_token_id=sampling.stop_ids[0] if sampling.stop_ids else 0,
    )
    sampler: Any = unwrap(policy)
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    images = [request.images for request, _ in wanted]
    types = torch.zeros_like(ids)
    for row, one in enumerate(images):
        if one is not None:
            types[row, width - len(one.token_types) :] = one.token_types
    inputs |= {name: value.to(device) for name, value in joined_images(images, types).items()}
    # Weights are whole, so that no process takes part in another's steps.
    alone = {"generation_config": config, "logits_processor": LogitsProcessorList([draws]), "synced_gpus": False}
    with own_generation_settings_away(sampler, inner):
        output = sampler.generate(**inputs, **alone)
    output = output[:, start:].cpu()
    logps = torch.stack(draws.logps, 1)
    kept = torch.stack(draws.kept, 1) if draws.kept else None
    return [_cut(output[row], logps[row], None if kept is None else kept[row], sampling) for row in range(len(wanted))]


def _cut(ids: Tensor, logps: Tensor, kept: Tensor | None, sampling: Sampling) -> Completion:
    """Without what was padded after the end."""
    stops = torch.isin(ids, torch.tensor(sampling.stop_ids, dtype=torch.int64)).nonzero()
    length = int(stops[0]) + 1 if len(stops) else len(ids)
    finish = "stop" if len(stops) else "length"
    return Completion(ids[:length], logps[:length], finish, kept=None if kept is None else kept[:length])
