"""Configurations of the trainers that compare with no reference: `ORPOTrainer`, `CPOTrainer`, and others' base."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tether.errors import ConfigError
from tether.training.config import PreferenceConfig, ReferenceArguments
from tether.training.declared import REGISTERED, option


@dataclass
class ReferenceFreeConfig(PreferenceConfig):
    """What trainers without a reference take.

    The fields that declare a reference keep their defaults; none is loaded or run.

    Raises:
        ConfigError: a reference was asked for.
    """

    def __post_init__(self) -> None:
        for field in fields(ReferenceArguments):
            value = getattr(self, field.name)
            if value != field.default and (field.name, value) != ("reference", "none"):
                raise ConfigError(
                    f"is {value!r}, but the objective of {type(self).__name__} compares with no reference. Leave it "
                    "out.",
                    field.name,
                )
        self.reference = "none"
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        """No."""
        return False


@dataclass
class ORPOConfig(ReferenceFreeConfig, algorithm="orpo"):
    """Configuration of `ORPOTrainer`; names and defaults as in TRL 1.16.

    Raises:
        ConfigError: an option outside its range.
    """

    beta: float = REGISTERED

    def __post_init__(self) -> None:
        self.check_objective()
        super().__post_init__()


@dataclass
class CPOConfig(ReferenceFreeConfig, algorithm="cpo"):
    """Configuration of `CPOTrainer`; names and defaults as in TRL 1.16.

    Raises:
        ConfigError: an unknown loss, an option outside its range, or one that does not apply to the loss.
    """

    loss_type: str = option(
        "sigmoid",
        "`sigmoid`, `hinge`, `ipo`, `simpo`, or `alphapo` (which stands for `simpo` with `cpo_alpha=0`).",
        key="objective.loss",
    )
    beta: float = REGISTERED
    label_smoothing: float = REGISTERED
    cpo_alpha: float = REGISTERED
    simpo_gamma: float = REGISTERED
    alpha: float = REGISTERED

    def __post_init__(self) -> None:
        if self.loss_type == "alphapo":
            self.loss_type, self.cpo_alpha = "simpo", 0.0
        self.check_objective()
        super().__post_init__()
