"""Configurations of the trainers that compare with no reference: `ORPOTrainer`, `CPOTrainer`, and others' base."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite

from tether.errors import ConfigError
from tether.training.arguments import PreferenceConfig
from tether.training.reference_arguments import ReferenceArguments

_CPO_LOSSES = ("sigmoid", "hinge", "ipo", "simpo", "alphapo")


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
                    f"{field.name}={value!r} came, but the objective of {type(self).__name__} compares with no "
                    f"reference. Leave {field.name} out."
                )
        self.reference = "none"
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        """No."""
        return False


@dataclass
class ORPOConfig(ReferenceFreeConfig):
    """Configuration of `ORPOTrainer`; names and defaults as in TRL 1.16.

    Args:
        beta: weight of the odds ratio beside the likelihood (the paper's lambda); above 0.

    Raises:
        ConfigError: an option outside its range.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        _require(self, "beta", self.beta > 0, "above 0")
        super().__post_init__()


@dataclass
class CPOConfig(ReferenceFreeConfig):
    """Configuration of `CPOTrainer`; names and defaults as in TRL 1.16.

    Args:
        loss_type: `sigmoid`, `hinge`, `ipo`, `simpo`, or `alphapo` (which stands for `simpo` with `cpo_alpha=0`).
        beta: turns log-probabilities into rewards, per nat (for `ipo` and `simpo`: per nat per token); above 0.
        label_smoothing: chance that a label is wrong, from 0 to below 0.5; for `sigmoid` and `simpo`.
        cpo_alpha: weight of the likelihood of the chosen completions; 0 leaves it out.
        simpo_gamma: the lead that the chosen reward should have; for `simpo`.
        alpha: shape of the reward `(1 - p^-alpha) / alpha`; 0 for `log p`.

    Raises:
        ConfigError: an unknown loss, an option outside its range, or one that does not apply to the loss.
    """

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.loss_type not in _CPO_LOSSES:
            raise ConfigError(f"loss_type is {self.loss_type!r}; allowed are {', '.join(_CPO_LOSSES)}.")
        if self.loss_type == "alphapo":
            self.loss_type, self.cpo_alpha = "simpo", 0.0
        _require(self, "beta", self.beta > 0, "above 0")
        _require(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "at least 0 and below 0.5")
        _require(self, "cpo_alpha", self.cpo_alpha >= 0, "at least 0")
        _require(self, "simpo_gamma", isfinite(self.simpo_gamma), "a number")
        _require(self, "alpha", isfinite(self.alpha), "a number")
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            raise ConfigError(f"label_smoothing does not apply to loss {self.loss_type!r}. Leave it at 0.")
        if self.simpo_gamma != 0.5 and self.loss_type != "simpo":
            raise ConfigError(f"simpo_gamma applies to loss 'simpo' only, not to {self.loss_type!r}. Leave it out.")
        super().__post_init__()

    def objective_options(self) -> dict[str, float]:
        """`beta`, and what else the loss takes."""
        options = {"beta": self.beta}
        if self.loss_type in ("sigmoid", "simpo"):
            options["label_smoothing"] = self.label_smoothing
        if self.loss_type == "simpo":
            options["simpo_gamma"] = self.simpo_gamma
        return options


def _require(config: ReferenceFreeConfig, name: str, met: bool, allowed: str) -> None:
    if not met:
        raise ConfigError(f"{name} is {getattr(config, name)}; it must be {allowed}.")
