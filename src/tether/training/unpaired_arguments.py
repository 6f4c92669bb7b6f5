"""Configuration of `KTOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass

from tether.training.config import PreferenceConfig
from tether.training.declared import REGISTERED, option


@dataclass
class KTOConfig(PreferenceConfig, algorithm="kto"):
    """Configuration of `KTOTrainer`; names and defaults as in TRL 1.16.

    Rows may be drawn in any order: unlike TRL's, the pairing for the KL estimate does not hang on it.

    Raises:
        ConfigError: an unknown loss, or an option outside its range.
    """

    loss_type: str = option("kto", "`kto`, `apo_zero_unpaired`, or `bco`.", key="objective.loss")
    beta: float = REGISTERED
    desirable_weight: float = REGISTERED
    undesirable_weight: float = REGISTERED

    def __post_init__(self) -> None:
        self.check_objective()
        super().__post_init__()
