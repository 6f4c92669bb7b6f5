"""What happens when memory ends and transformers begins a run again (`auto_find_batch_size`)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import Trainer

from tether.training.budget import TokenBudget

logger = logging.getLogger("tether")
_LEAST_TOKENS = 16


@dataclass
class Attempts:
    """The attempts of one call of `train`: each begins with the weights, and the optimizer, of the first.

    The batch of a step stays as it was asked for: fewer tokens are computed at once, which gives the same gradient.
    Only where a batch must stay whole it gets smaller, as transformers proposes.

    Args:
        weights: of the first beginning, by name, in the host's memory; what trains alone.
        batch_size: of the first.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    batch_size: int = 0

    def begin(self, trainer: Trainer, policy: nn.Module, budget: TokenBudget, batch_size: int) -> int:
        """Begin, or begin again.

        Args:
            trainer: whose optimizer is made anew.
            policy: put back to where it was.
            budget: halved at each further attempt.
            batch_size: what transformers proposes.

        Returns:
            The rows of a batch.
        """
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        if not self.weights:
            self.batch_size = batch_size
            self.weights = {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}
            return batch_size
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(self.weights[name])
                parameter.grad = None
        trainer.optimizer = None
        if budget.tokens is None or budget.tokens < 2 * _LEAST_TOKENS:
            logger.warning(f"memory: full; begun again from the start with batches of {batch_size} rows on a device")
            return batch_size
        budget.tokens //= 2
        logger.warning(
            f"memory: full; begun again from the start with at most {budget.tokens:,} tokens a forward "
            f"(max_tokens_per_forward), in batches of {self.batch_size} rows as before"
        )
        return self.batch_size
