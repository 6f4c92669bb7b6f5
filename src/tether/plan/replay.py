"""A training step of a model without weights, which counts the bytes that are held at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tether.compat.torch import DispatchMode, has_no_values, memory_address, tree_leaves, without_values
from tether.models.structure import trainable_tensors, transformers_model
from tether.types import ScoringBatch


@dataclass(frozen=True)
class StepBytes:
    """Bytes at the moment of a step at which most are held, by what they are for.

    Args:
        gradients: of trainable tensors.
        head: logits and what is computed of them; anything as wide as the vocabulary that no gradient is.
        activations: all else that the forward leaves for the backward, or the backward computes.
    """

    gradients: int
    head: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.gradients + self.head + self.activations


class _Count(DispatchMode):
    """Follows every tensor that an operation returns until nothing refers to its memory."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._known: dict[int, tuple[int, bool]] = {}
        self._now, self._wide, self.peak, self.peak_wide = 0, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        for one in tree_leaves(answer):
            if isinstance(one, Tensor) and has_no_values(one):
                self._follow(one)
        if self._now > self.peak:
            self.peak, self.peak_wide = self._now, self._wide
        return answer

    def _follow(self, tensor: Tensor) -> None:
        memory = tensor.untyped_storage()
        place = memory_address(memory)
        if place in self._known:
            return
        size, wide = memory.nbytes(), bool(tensor.dim()) and tensor.shape[-1] == self._vocabulary
        self._known[place] = (size, wide)
        self._now += size
        self._wide += size * wide
        weakref.finalize(memory, self._forget, place)

    def _forget(self, place: int) -> None:
        size, wide = self._known.pop(place)
        self._now -= size
        self._wide -= size * wide


def replay(
    model: nn.Module, batch: ScoringBatch, values_of: Callable[[nn.Module, ScoringBatch], Tensor], repeats: int
) -> StepBytes:
    """Bytes that micro-batches of a step hold at once, besides weights, optimizer and reference.

    Args:
        model: on the device `meta`, with what trains, in training mode; changed in place.
        batch: the largest micro-batch.
        values_of: the pass of a run: numbers that depend on the trainable tensors.
        repeats: micro-batches of a step; gradients of the first are there while a second is computed.
    """
    inner = transformers_model(model)
    with without_values():
        model.to_empty(device="cpu")
        inner.tie_weights()
        with _Count(inner.config.get_text_config().vocab_size) as count:
            for _ in range(min(repeats, 2)):
                values_of(model, batch).float().sum().backward()
    trained = list(trainable_tensors(model).values())
    gradients = sum(one.grad.numel() * one.grad.element_size() for one in trained if one.grad is not None)
    model.zero_grad(set_to_none=True)
    # A tied head's gradient, `[vocabulary, hidden]`, is not as wide as the vocabulary; it is among the gradients.
    head = min(count.peak_wide, count.peak)
    # What is held of gradients at the peak lies between none and all; they take the rest first.
    held = min(gradients, max(count.peak - head, 0))
    return StepBytes(held, head, count.peak - head - held)
