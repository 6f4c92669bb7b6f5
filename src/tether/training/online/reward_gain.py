"""How far the mean reward of sampled completions has come since the first log, and how sure a mean is."""

from __future__ import annotations

import torch
from torch import Tensor


def group_means(rewards: Tensor, group: int) -> Tensor:
    """The mean reward of each group that has one, of `[K]` with NaN where none applied."""
    means = rewards.view(-1, group).nanmean(1)
    return means[~means.isnan()]


def standard_error(groups: Tensor) -> float | None:
    """Of the mean of group means, which are independent; None of fewer than two.

    >>> round(standard_error(torch.tensor([0.0, 1.0, 0.0, 1.0])), 4)
    0.2887
    """
    return (groups.double().var() / len(groups)).sqrt().item() if len(groups) > 1 else None


class Progress:
    """How far the mean reward has come since the first log, with its standard error, over groups.

    Completions of a group share their prompt, so that groups are what is independent.
    """

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None
        self._groups: list[Tensor] = []

    def add(self, rewards: Tensor, group: int) -> None:
        """Take the rewards `[K]` of a rollout, NaN where none applied."""
        self._groups.append(group_means(rewards, group))

    def since(self) -> dict[str, float]:
        """What to log of the rollouts since the last call; nothing where there was none."""
        groups, self._groups = torch.cat([torch.empty(0), *self._groups]).double(), []
        if not len(groups):
            return {}
        # A single group has no spread: its error is not a number, and is not logged.
        spread = groups.var().item() / len(groups) if len(groups) > 1 else torch.nan
        mean, before = groups.mean().item(), self.first
        if before is None:
            self.first = mean, spread
            return {"reward/delta": 0.0}
        error = (spread + before[1]) ** 0.5
        found = {"reward/delta": mean - before[0]}
        return found if error != error else {**found, "reward/delta_error": error}

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {} if self.first is None else {"first_reward": self.first[0], "first_reward_variance": self.first[1]}

    def load(self, state: dict[str, float]) -> None:
        """Take it; empty for a fresh start."""
        given = "first_reward" in state
        self.first = (state["first_reward"], state["first_reward_variance"]) if given else None
        self._groups = []
