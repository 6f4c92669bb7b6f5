"""Configuration of `RewardTrainer`."""

from __future__ import annotations

from dataclasses import dataclass

from tether.errors import ConfigError
from tether.objectives.others import option_problem
from tether.training.reference_free_arguments import ReferenceFreeConfig


@dataclass
class RewardConfig(ReferenceFreeConfig):
    """Configuration of `RewardTrainer`; names and defaults as in TRL 1.16.

    Args:
        max_length: tokens of prompt and completion together; pairs of which one is longer are dropped, since the end of
            a text decides its reward. None keeps all.
        truncation_mode: stays `drop`.
        center_rewards_coefficient: weight of a term that draws the rewards' mean to 0; None for none. The paper uses
            0.01.

    Raises:
        ConfigError: an option outside its range.
    """

    learning_rate: float = 1e-4
    truncation_mode: str = "drop"
    center_rewards_coefficient: float | None = None

    def __post_init__(self) -> None:
        if self.center_rewards_coefficient is not None:
            problem = option_problem("reward", {"center_rewards_coefficient": self.center_rewards_coefficient})
            if problem:
                raise ConfigError(problem)
        if self.router_aux_loss_coef is not None:
            raise ConfigError(
                f"router_aux_loss_coef={self.router_aux_loss_coef!r} came, which reward models do not take, as in TRL. "
                "Leave it out."
            )
        if self.truncation_mode != "drop":
            raise ConfigError(
                f"truncation_mode={self.truncation_mode!r} came, but longer pairs are dropped here, not cut, since the "
                "end of a text decides its reward. Leave truncation_mode out."
            )
        if self.turns != "all":
            raise ConfigError(
                f"turns={self.turns!r} came, but a reward is of the whole text, read at its end. Leave turns out."
            )
        super().__post_init__()
