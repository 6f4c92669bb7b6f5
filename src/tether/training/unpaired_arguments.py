"""Configuration of `KTOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tether.errors import ConfigError
from tether.objectives.others import option_problem
from tether.objectives.unpaired import UNPAIRED
from tether.training.arguments import PreferenceConfig
from tether.types import Kind


@dataclass
class KTOConfig(PreferenceConfig):
    """Configuration of `KTOTrainer`; names and defaults as in TRL 1.16.

    Rows may be drawn in any order: unlike TRL's, the pairing for the KL estimate does not hang on it.

    Args:
        loss_type: `kto`, `apo_zero_unpaired`, or `bco`.
        beta: how strongly the policy is held to the reference, per nat; above 0.
        desirable_weight: factor of the losses of desirable rows, above 0.
        undesirable_weight: factor of the losses of the others, above 0.

    Raises:
        ConfigError: an unknown loss, or an option outside its range.
    """

    kind: ClassVar[Kind] = "unpaired"

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_type not in UNPAIRED:
            raise ConfigError(f"loss_type is {self.loss_type!r}; allowed are {', '.join(UNPAIRED)}.")
        problem = option_problem(self.loss_type, self.objective_options())
        if problem:
            raise ConfigError(problem)
        super().__post_init__()

    def objective_options(self) -> dict[str, float]:
        """`beta` and the weights of the two classes."""
        names = ("beta", "desirable_weight", "undesirable_weight")
        return {name: getattr(self, name) for name in names}
