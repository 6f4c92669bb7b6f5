"""What a loss with a KL per token needs besides log-probs: the hidden states of both models before their heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tether.errors import ReferenceError
from tether.models.structure import transformers_model
from tether.scoring.divergence import frozen_head, token_divergence
from tether.scoring.head import Head
from tether.scoring.score import head_of
from tether.types import Scores, ScoringBatch


class ReferenceStates:
    """Keeps what the last reference pass gave to its head. A reference scores with a scorer that tells this object.

    A reference that runs no model, as one that reads stored log-probs, tells nothing, which is an error.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Head] | None = None

    def kept_by(self, scorer: Callable[..., Scores]) -> Callable[..., Scores]:
        """The same scorer; its passes without a gradient and without further outputs, a reference's, are kept."""

        def keeping(model: nn.Module, batch: ScoringBatch, **options: Any) -> Scores:
            if torch.is_grad_enabled() or "outputs" in options:
                return scorer(model, batch, **options)
            scores = scorer(model, batch, outputs=("hidden",), **options)
            assert scores.hidden is not None
            self._last = scores.hidden, frozen_head(head_of(transformers_model(model)))
            return scores

        return keeping

    def forget(self) -> None:
        """Before a batch: what is kept then is of this batch."""
        self._last = None

    def with_divergence(self, policy: Scores, model: nn.Module) -> Scores:
        """The policy's scores with KL(reference, policy) at each token.

        Args:
            policy: scores of the batch that the reference has scored last, with `hidden`.
            model: the policy.

        Raises:
            ReferenceError: the reference ran no model here.
        """
        if self._last is None or policy.hidden is None:
            raise ReferenceError(
                "The loss takes a KL per token, and this reference gives log-probs of single tokens only. Use "
                "reference_means adapter_off, snapshot or model, which run the reference here."
            )
        hidden, head = self._last
        device = policy.hidden.device
        kl = token_divergence(hidden.to(device), head, policy.hidden, head_of(transformers_model(model)))
        return replace(policy, reference_kl=kl, hidden=None)
