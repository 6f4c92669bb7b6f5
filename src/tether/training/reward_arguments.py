"""Configuration of `RewardTrainer`."""

from __future__ import annotations

from dataclasses import dataclass

from tether.errors import ConfigError
from tether.training.declared import REGISTERED
from tether.training.reference_free_arguments import ReferenceFreeConfig


@dataclass
class RewardConfig(ReferenceFreeConfig, algorithm="reward"):
    """Configuration of `RewardTrainer`; names and defaults as in TRL 1.16.

    Pairs of which one completion is longer than `max_length` are dropped, since the end of a text decides its reward.

    Raises:
        ConfigError: an option outside its range.
    """

    learning_rate: float = 1e-4
    truncation_mode: str = "drop"
    center_rewards_coefficient: float | None = REGISTERED

    def __post_init__(self) -> None:
        self.check_objective()
        if self.router_aux_loss_coef is not None:
            raise ConfigError(
                f"is {self.router_aux_loss_coef!r}, and reward models do not take it, as in TRL. Leave it out.",
                "router_aux_loss_coef",
            )
        if self.truncation_mode != "drop":
            raise ConfigError(
                f"is {self.truncation_mode!r}, but longer pairs are dropped here, not cut, since the end of a text "
                "decides its reward. Leave it out.",
                "truncation_mode",
            )
        if self.turns != "all":
            raise ConfigError(
                f"is {self.turns!r}, but a reward is of the whole text, read at its end. Leave it out.", "turns"
            )
        super().__post_init__()
