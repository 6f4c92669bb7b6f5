"""From the rewards of groups of completions to advantages: float32 `[K]` in and out, completions of one prompt side by
side. NaN is a reward that does not apply: it is no part of any mean, and its advantage is 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tether.types import PerCompletion

Scale = Literal["group", "batch", "none"]
# What is added to a standard deviation before something is divided by it, as in TRL.
EPSILON = 1e-4


def spread(values: Tensor, dim: int | None = None) -> Tensor:
    """Standard deviation with n - 1 of what is not NaN; NaN where there is one value or none.

    >>> spread(torch.tensor([1.0, 3.0, float("nan")]))
    tensor(1.4142)
    """
    kept = ~values.isnan()
    mean = values.nanmean(dim, keepdim=True) if dim is not None else values.nanmean()
    squares = torch.where(kept, (values - mean).square(), 0.0)
    total, count = (squares.sum(), kept.sum()) if dim is None else (squares.sum(dim), kept.sum(dim))
    return torch.where(count > 1, (total / (count - 1).clamp(min=1)).sqrt(), torch.nan)


def weighted_sum(rewards: Float[Tensor, "K R"], weights: Float[Tensor, " R"]) -> PerCompletion:
    """Rewards of each completion joined: `[K]` of `[K, R]`; NaN where none applies.

    Args:
        rewards: `[K, R]`, NaN for not applicable.
        weights: `[R]`.

    Example:
        >>> nan = float("nan")
        >>> weighted_sum(torch.tensor([[1.0, nan], [2.0, 3.0], [nan, nan]]), torch.tensor([1.0, 0.5]))
        tensor([1.0000, 3.5000,    nan])
    """
    total = (rewards * weights).nansum(1)
    return total.masked_fill(rewards.isnan().all(1), torch.nan)


def group_advantages(rewards: PerCompletion, group: int, scale: Scale = "group") -> PerCompletion:
    """Reward minus the mean of its group, over a standard deviation.

    Args:
        rewards: `[K]`.
        group: completions of each prompt.
        scale: what it is divided by: the deviation of its `group`, of the whole `batch`, or nothing (`none`).

    Reference:
        Shao et al., DeepSeekMath, section 4.1.2, arXiv:2402.03300; without the division Liu et al., Understanding
        R1-Zero-Like Training, arXiv:2503.20783.

    Example:
        >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2, "none")
        tensor([-1.,  1.,  0.,  0.])
    """
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.nanmean(1, keepdim=True)
    if scale == "group":
        centred = centred / (spread(grouped, 1)[:, None] + EPSILON)
    elif scale == "batch":
        centred = centred / (spread(rewards) + EPSILON)
    return centred.flatten().nan_to_num(nan=0.0)


def normalize_then_sum(
    rewards: Float[Tensor, "K R"], weights: Float[Tensor, " R"], group: int
) -> tuple[PerCompletion, PerCompletion]:
    """Each reward function normalised inside its group, their weighted sum normalised over all completions.

    Args:
        rewards: `[K, R]`.
        weights: `[R]`.
        group: completions of each prompt.

    Returns:
        The advantages `[K]`, and the sums `[K]` that they are made of.

    Reference:
        GDPO: Group reward-Decoupled Normalization Policy Optimization, arXiv:2601.05242.
    """
    grouped = rewards.view(-1, group, rewards.shape[1])
    centred = grouped - grouped.nanmean(1, keepdim=True)
    each = (centred / (spread(grouped, 1)[:, None] + EPSILON)).view_as(rewards)
    total = (each * weights).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)
    return ((total - total.nanmean()) / (spread(total) + EPSILON)).nan_to_num(nan=0.0), total


def leave_one_out(rewards: PerCompletion, group: int, *, normalize: bool = False) -> PerCompletion:
    """Reward minus the mean of the group's others.

    Args:
        rewards: `[K]`.
        group: completions of each prompt.
        normalize: make the advantages of all completions have mean 0 and deviation 1.

    Reference:
        Ahmadian et al., Back to Basics: Revisiting REINFORCE Style Optimization, eq. 8, arXiv:2402.14740.

    Example:
        >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0]), 3)
        tensor([-3.0000, -1.5000,  4.5000])
    """
    grouped = rewards.view(-1, group)
    others = (~grouped.isnan()).sum(1, keepdim=True) - 1
    # A completion that is the only one with a reward is compared with nothing.
    baseline = (grouped.nansum(1, keepdim=True) - grouped) / torch.where(others > 0, others, torch.nan)
    advantages = (grouped - baseline).flatten()
    if normalize:
        advantages = (advantages - advantages.nanmean()) / (spread(advantages) + EPSILON)
    return advantages.nan_to_num(nan=0.0)


def without_variance(rewards: PerCompletion, group: int) -> Bool[Tensor, " K"]:
    """Bool `[K]`: all rewards of the completion's group are the same number, so that none is better than another.

    >>> without_variance(torch.tensor([1.0, 1.0, 0.0, 1.0]), 2)
    tensor([ True,  True, False, False])
    """
    grouped = rewards.view(-1, group)
    low, high = grouped.nan_to_num(nan=torch.inf).amin(1), grouped.nan_to_num(nan=-torch.inf).amax(1)
    return (low >= high).repeat_interleave(group)
