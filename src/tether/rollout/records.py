"""The records of a rollout: what is asked of an engine, and what it gives back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tether.types import ImageInputs

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        temperature: what logits are divided by, above 0.
        max_tokens: the most that a completion may have.
        stop_ids: tokens that end a completion, of which they are the last.
        top_k: draw among that many most likely tokens; 0: all.
        top_p: draw among the fewest most likely tokens that hold this share of the probability.
        min_p: draw among tokens of at least this share of the most likely one's probability; 0: all.
        seed: of every draw.
        repetition_penalty: what logits of tokens that prompt or completion have already are divided by, or multiplied
            where they are negative; 1: nothing.
        pattern: regular expression that a server holds completions to; None: none.
        never: tokens that are never drawn: those that stand for a part of an image.

    Example:
        >>> Sampling(1.0, 8, (2,)).cuts, Sampling(1.0, 8, (2,), top_p=0.9).cuts
        (False, True)
    """

    temperature: float
    max_tokens: int
    stop_ids: tuple[int, ...]
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    pattern: str | None = None
    never: tuple[int, ...] = ()

    @property
    def penalises(self) -> bool:
        """Whether tokens that are there already are less likely than the policy has them."""
        return self.repetition_penalty != 1

    @property
    def cuts(self) -> bool:
        """Whether some tokens are never drawn."""
        return bool(self.top_k or self.min_p or self.never) or self.top_p < 1

    @property
    def digest(self) -> str:
        """Of all values."""
        return blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class RolloutRequest:
    """Completions that are wanted of a prompt.

    Args:
        prompt_ids: int64 `[P]`.
        source_row: number of the row in the data that it came from.
        branches: which of the prompt's group.
        number: of the rollout; a completion is drawn by it, the row and its place in the group.
        row: the row's columns, as they came.
        images: of the prompt; None: none.
    """

    prompt_ids: Tensor
    source_row: int
    branches: range
    number: int | str = 0
    row: Mapping[str, Any] = field(default_factory=dict)
    images: ImageInputs | None = None

    def key(self, branch: int, seed: int) -> bytes:
        """What the draws of a completion are made of: nothing of other completions, batches or processes."""
        told = f"{seed} {self.number} {self.source_row} {branch}".encode()
        return blake2b(told + self.prompt_ids.numpy().tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Args:
        ids: int64 `[C]`, at least one.
        logps: float32 `[C]` nats of what it was drawn from, at the temperature, with the penalty and before any cut;
            None: not reported.
        finish: `stop`: by one of the stop tokens; `length`: cut off.
        written: bool `[C]`, False for tokens that the policy did not write, such as a tool's; None: all.
        kept: float32 `[C]`, the probability that a cut left to draw from; None where nothing was cut.
        fields: further values of it, which rewards may name.
    """

    ids: Tensor
    logps: Tensor | None
    finish: Finish
    written: Tensor | None = None
    kept: Tensor | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens that the policy wrote."""
        return len(self.ids) if self.written is None else int(self.written.sum())


@dataclass(frozen=True)
class Group:
    """Completions of one prompt.

    Args:
        request: what was asked.
        completions: one for each of its branches.
        prompt_ids: what the completions were really sampled after, where the engine did not take the request's ids.
    """

    request: RolloutRequest
    completions: tuple[Completion, ...]
    prompt_ids: Tensor | None = None

    @property
    def prompt(self) -> Tensor:
        """int64 `[P]`, the ids that are trained on."""
        return self.request.prompt_ids if self.prompt_ids is None else self.prompt_ids


class RolloutEngine(Protocol):
    """What samples completions.

    Attributes:
        name: what it is called in messages.
        embedded: it computes with the policy's own weights, so that its log-probs are the trainer's.
    """

    name: str
    embedded: bool

    def generate(self, policy: nn.Module, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Group]:
        """A group for each request, in their order."""
        ...


def as_ids(ids: Sequence[int]) -> Tensor:
    """int64 `[C]`."""
    return torch.as_tensor(ids, dtype=torch.int64)
