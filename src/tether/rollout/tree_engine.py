"""Sampling as a tree: each prompt computed once, its keys kept once for the whole group, no cache object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tether.errors import ScoringError
from tether.models.adapters import virtual_tokens
from tether.models.structure import evaluation_mode, transformers_model
from tether.reference.methods.shards import gathered
from tether.rollout.decode import Decoding
from tether.rollout.records import Completion, Group, RolloutRequest, Sampling
from tether.rollout.sample import Drawn, draw, seen_tokens
from tether.scoring.attention.interface import (
    backends_for,
    forest_forward,
    install_tree_attention,
    require_all_attended,
)
from tether.scoring.layout.encoder_decoder import is_encoder_decoder
from tether.scoring.score import capture_hidden, head_of, require_tree
from tether.types import Forest, Tree

# Tokens of prompts and completions that are in memory at once; more prompts come after another.
_TOKENS = 2**16


@dataclass
class _Written:
    """A completion as it grows."""

    ids: list[Tensor] = field(default_factory=list)
    logps: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)


class TreeEngine:
    """The embedded engine; see `tether.rollout.records.RolloutEngine`.

    Args:
        precision: a context of the run's precision.
        tokens: of prompts and completions in memory at once.
        wide_head: see `tether.scoring.score`.
    """

    name = "tree"
    embedded = True

    def __init__(
        self,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
        tokens: int = _TOKENS,
        wide_head: bool = False,
    ) -> None:
        self._precision, self._tokens, self._wide_head = precision, tokens, wide_head

    def generate(self, policy: nn.Module, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Group]:
        """Sample a group for each request.

        Raises:
            ScoringError: the architecture cannot be computed as a tree, or a prompt has images.
        """
        refuse_unfit(policy)
        found: list[Group] = []
        with gathered(policy), torch.no_grad(), evaluation_mode(policy), self._precision():
            if any(request.images is not None for request in requests):
                raise ScoringError("a prompt has images, which the tree engine does not read.")
            for part in self._parts(requests, sampling):
                found += self._grow(policy, part, sampling)
        return found

    def _parts(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> Iterator[list[RolloutRequest]]:
        part: list[RolloutRequest] = []
        size = 0
        for request in requests:
            cost = len(request.prompt_ids) + len(request.branches) * sampling.max_tokens
            if part and size + cost > self._tokens:
                yield part
                part, size = [], 0
            part.append(request)
            size += cost
        if part:
            yield part

    def _grow(self, policy: nn.Module, requests: list[RolloutRequest], sampling: Sampling) -> list[Group]:
        device = next(policy.parameters()).device
        keys = [request.key(branch, sampling.seed) for request in requests for branch in request.branches]
        counts = [len(request.branches) for request in requests]
        decoding = Decoding([len(request.prompt_ids) for request in requests], counts, device)
        model = _Model(policy, decoding, sampling.temperature, self._wide_head)
        logits = model.prompts(requests).repeat_interleave(torch.tensor(counts, device=device), 0)
        seen = None
        if sampling.penalises:
            prompts = [request.prompt_ids for request in requests for _ in request.branches]
            seen = seen_tokens(prompts, logits.shape[1], device)
        stops = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
        written, live = [_Written() for _ in keys], list(range(len(keys)))
        for place in range(sampling.max_tokens):
            drawn = draw(logits, [keys[number] for number in live], place, sampling, seen)
            _write(written, live, drawn)
            going = (~torch.isin(drawn.ids, stops)).nonzero()[:, 0]
            if place + 1 == sampling.max_tokens or not len(going):
                break
            if len(going) < len(live):
                live = [live[row] for row in going.tolist()]
                seen = None if seen is None else seen[going]
                decoding.keep(going)
            logits = model.next(drawn.ids[going])
        completions = iter(_finished(one, sampling) for one in written)
        return [Group(one, tuple(next(completions) for _ in one.branches)) for one in requests]


class _Model:
    """The policy, called for prompts and then for a token of each branch."""

    def __init__(self, policy: nn.Module, decoding: Decoding, temperature: float, wide_head: bool) -> None:
        self._policy, self._inner = policy, transformers_model(policy)
        self._decoding, self._head = decoding, head_of(self._inner, temperature, wide_head)
        install_tree_attention(self._inner)

    def prompts(self, requests: list[RolloutRequest]) -> Tensor:
        """Logits `[prompts, vocabulary]` after each prompt."""
        trees, start = [], 0
        for request in requests:
            trees.append(Tree(start, 0, (len(request.prompt_ids),)))
            start = trees[-1].end
        device = next(self._policy.parameters()).device
        ids = torch.cat([request.prompt_ids for request in requests]).to(device)
        positions = torch.cat([torch.arange(len(request.prompt_ids)) for request in requests]).to(device)
        backend = backends_for(device, gradients=False)[-1]
        hidden = self._hidden(ids, positions, forest=Forest(tuple(trees)), tree_backend=backend)
        return self._head.logits(hidden[[tree.end - 1 for tree in trees]])

    def next(self, ids: Tensor) -> Tensor:
        """Logits `[rows, vocabulary]` after another token of each row."""
        positions = self._decoding.positions
        self._decoding.begin()
        return self._head.logits(self._hidden(ids, positions))

    def _hidden(self, ids: Tensor, positions: Tensor, **layout: object) -> Tensor:
        with capture_hidden(self._head.module) as captured, forest_forward() as attended:
            self._policy(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                decoding=self._decoding,
                **layout,
            )
        require_all_attended(self._inner, attended)
        return captured[0][0]


def _write(written: list[_Written], live: list[int], drawn: Drawn) -> None:
    ids, logps = drawn.ids.cpu(), drawn.logps.cpu()
    kept = None if drawn.kept is None else drawn.kept.cpu()
    for row, number in enumerate(live):
        written[number].ids.append(ids[row])
        written[number].logps.append(logps[row])
        if kept is not None:
            written[number].kept.append(kept[row])


def _finished(one: _Written, sampling: Sampling) -> Completion:
    ids = torch.stack(one.ids)
    finish = "stop" if int(ids[-1]) in sampling.stop_ids else "length"
    return Completion(ids, torch.stack(one.logps), finish, kept=torch.stack(one.kept) if one.kept else None)


def refuse_unfit(policy: nn.Module) -> None:
    """Refuse a model that is known not to grow as a tree.

    Raises:
        ScoringError: with the reason.
    """
    inner = transformers_model(policy)
    if is_encoder_decoder(inner):
        raise ScoringError(f"{type(inner).__name__} reads prompts in an encoder")
    if virtual_tokens(policy):
        raise ScoringError("virtual tokens of prompt tuning come before each prompt")
    require_tree(inner)
