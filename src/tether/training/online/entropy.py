"""The entropy of what is sampled as a part of the training: a bonus in the loss, and which tokens have a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tether.objectives.online.policy_gradient_loss import HighEntropy
from tether.training.algorithms.base import Passes
from tether.training.step import Context, Step


@dataclass(frozen=True)
class OnlineContext(Context):
    """What is known of a step of training before its first micro-batch.

    Args:
        high: its tokens of the highest entropy, where these alone have a policy gradient.
    """

    high: HighEntropy | None = None


def highest_of(step: Step, passes: Passes, share: float) -> HighEntropy:
    """The tokens of a step, over all processes, with the highest entropy; one more pass without a gradient.

    Args:
        step: this process' part; each process has to call.
        passes: of the run.
        share: of the trained tokens.
    """
    found = []
    for part in step.parts:
        batch = part.batch.to(passes.accelerator.device)
        entropy = passes.policy(batch, outputs=("entropy",)).entropy
        assert entropy is not None
        trained = batch.completion_values["weight"][batch.completion_index] > 0
        found.append(entropy[trained] if part.counts else entropy[:0])
    mine = torch.cat(found)
    if passes.accelerator.num_processes > 1:
        most = int(passes.gather(mine.new_tensor([len(mine)])).max())
        every = passes.gather(torch.cat([mine, mine.new_full((most - len(mine),), torch.nan)]))
        mine = every[~every.isnan()]
    return HighEntropy.among(mine, share)


@dataclass
class EntropyBonus:
    """The coefficient of the entropy in the loss; with a target it changes after each step, by TRL's rule.

    Below the target it grows by `delta`, above it shrinks, and it counts only where the entropy of the last step was at
    or below the target.

    Args:
        coefficient: at the start.
        target: nats; None: the coefficient stays.
        delta: of a step.
        low: bound of the coefficient.
        high: bound of the coefficient.

    Reference:
        He et al., Skywork Open Reasoner 1, section 3, arXiv:2505.22312.
    """

    coefficient: float
    target: float | None = None
    delta: float = 0.0
    low: float = 0.0
    high: float = 1.0
    last: float = math.inf
    _sums: list[Tensor] = field(default_factory=list)

    @property
    def now(self) -> float:
        """What the entropy is multiplied by in this step."""
        return self.coefficient if self.target is None or self.last <= self.target else 0.0

    def saw(self, total: Tensor, count: Tensor) -> None:
        """Count the entropies of a micro-batch: their sum, and how many they are."""
        if self.target is not None:
            self._sums.append(torch.stack([total, count]))

    def step(self, passes: Passes) -> None:
        """A step has ended; each process has to call."""
        if self.target is None:
            return
        mine = torch.stack(self._sums).sum(0) if self._sums else torch.zeros(2)
        self._sums.clear()
        total, count = passes.total(mine.to(next(passes.model().parameters()).device)).tolist()
        self.last = total / max(count, 1.0)
        if self.last <= self.target:
            self.coefficient = min(self.coefficient + self.delta, self.high)
        else:
            self.coefficient = max(self.coefficient - self.delta, self.low)

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        if self.target is None or math.isinf(self.last):
            return {}
        return {"entropy_coef": self.coefficient, "entropy": self.last}

    def load(self, state: dict[str, float]) -> None:
        """See `state`."""
        self.coefficient = state.get("entropy_coef", self.coefficient)
        self.last = state.get("entropy", self.last)
