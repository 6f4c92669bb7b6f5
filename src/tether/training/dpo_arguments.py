"""Configuration of `DPOTrainer`: the objective and its options, over what every preference trainer takes."""

from __future__ import annotations

from dataclasses import dataclass

from tether.errors import ConfigError
from tether.objectives import check_options
from tether.training.arguments import PreferenceConfig


@dataclass
class DPOConfig(PreferenceConfig):
    """Configuration of `DPOTrainer`; names and defaults as in TRL 1.16.

    Args:
        loss_type: a name in `tether.objectives.OBJECTIVES`.
        beta: how strongly the policy is held to the reference, per nat; above 0.
        label_smoothing: chance that a label is wrong, from 0 to below 0.5.

    Raises:
        ConfigError: an unknown loss, or an option outside its range.
    """

    loss_type: str | list[str] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if len(names) != 1:
            raise ConfigError(f"loss_type is {names!r}; one loss is needed. Several at once are not available yet.")
        self.loss_type = names[0]
        problem = check_options(self.loss_type, self.objective_options())
        if problem:
            raise ConfigError(problem)
        super().__post_init__()

    def objective_options(self) -> dict[str, float]:
        """`beta` and `label_smoothing`."""
        return {"beta": self.beta, "label_smoothing": self.label_smoothing}
