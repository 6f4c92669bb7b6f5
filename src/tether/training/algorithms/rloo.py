"""REINFORCE leave-one-out: each completion compared with the others of its prompt, the KL a part of the reward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from tether.errors import ConfigError
from tether.objectives import OBJECTIVES
from tether.objectives.online.advantages import leave_one_out, weighted_sum
from tether.objectives.online.policy_gradient_loss import PolicyGradient
from tether.training.declaration import REGISTERED, option
from tether.training.online.algorithm import Online
from tether.training.online.config import OnlineConfig
from tether.training.online.trainer import OnlineTrainer


@dataclass
class RLOOConfig(OnlineConfig, algorithm="rloo"):
    """Configuration of `RLOOTrainer`; names and defaults as in TRL 1.16.

    Raises:
        ConfigError: an option outside its range or without effect, or options that have no meaning together.
    """

    num_generations: int = 2
    beta: float = REGISTERED
    epsilon: float = REGISTERED
    epsilon_high: float | None = REGISTERED
    delta: float | None = REGISTERED
    normalize_advantages: bool = option(False, "Make the advantages of a rollout have mean 0 and deviation 1.")
    reward_clip_range: list[float] | None = option(None, "Bounds that sums of rewards are cut to; None: none.")

    def __post_init__(self) -> None:
        clip = self.reward_clip_range
        if clip is not None and (len(clip) != 2 or clip[0] >= clip[1]):
            raise ConfigError(f"is {clip!r}; expected two numbers, the lower first.", "reward_clip_range")
        super().__post_init__()


class RLOO(Online):
    """The loss `rloo` of the registry; see `RLOOTrainer`."""

    config = RLOOConfig
    args: RLOOConfig  # type: ignore[assignment]

    @cached_property
    def objective(self) -> PolicyGradient:
        """Surrogate, correction, reduction; the KL is in the reward."""
        options = {name: value for name, value in self.args.objective_options().items() if name != "beta"}
        return PolicyGradient(OBJECTIVES["rloo"]["rloo"], options, kl="k1", correction=self.args.correction())

    @property
    def kl_in_reward(self) -> bool:
        """Always."""
        return True

    def advantages(self, rewards: Tensor, weights: Tensor, kl: Tensor | None, group: int) -> Tensor:
        """Rewards, less their KL, against the mean of the group's others."""
        total, clip = weighted_sum(rewards, weights), self.args.reward_clip_range
        total = total if clip is None else total.clamp(clip[0], clip[1])
        total = total if kl is None else total - self.args.beta * kl
        return leave_one_out(total, group, normalize=self.args.normalize_advantages)


class RLOOTrainer(OnlineTrainer):
    """REINFORCE leave-one-out; arguments as in TRL 1.16, and `rollout_func`; see `GRPOTrainer` for them.

    Reference:
        Ahmadian et al., Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
        LLMs, arXiv:2402.14740.
    """

    args: RLOOConfig  # type: ignore[override]
    algorithm_class = RLOO
