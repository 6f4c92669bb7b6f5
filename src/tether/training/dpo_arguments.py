"""Configuration of `DPOTrainer`: the objective and its options, over what every preference trainer takes."""

from __future__ import annotations

from dataclasses import dataclass

from tether.errors import ConfigError
from tether.objectives import Combination
from tether.training.config import PreferenceConfig
from tether.training.declared import REGISTERED, option


@dataclass
class DPOConfig(PreferenceConfig, algorithm="dpo"):
    """Configuration of `DPOTrainer`; names and defaults as in TRL 1.16, and options of the objectives TRL has not.

    What each loss is, and which options it takes: docs/choosing_an_objective.md.

    Raises:
        ConfigError: an unknown loss, an option outside its range or without effect, or options that have no meaning
            together.
    """

    loss_type: str | list[str] = option(
        "sigmoid",
        'One or several names in `tether.objectives.OBJECTIVES["dpo"]`, for pairs or for ranked lists.',
        key="objective.loss",
    )
    loss_weights: list[float] | None = option(
        None, "One for each of several losses, above 0; None: 1 each.", key="objective.weights"
    )
    beta: float = REGISTERED
    label_smoothing: float = REGISTERED
    f_divergence_type: str = option(
        "reverse_kl",
        "What holds the policy to the reference: `reverse_kl`, `forward_kl`, `js_divergence` or `alpha_divergence`.",
    )
    f_alpha_divergence_coef: float | None = option(None, "Exponent of `alpha_divergence`; None: 0.5.")
    ld_alpha: float | None = option(
        None,
        "Weight, from 0 to 1, of the tokens by which a completion is longer than the other (LD-DPO); None: all count "
        "alike.",
    )
    use_weighting: bool = option(False, "Weigh each pair by how likely the policy would have written it (WPO).")
    discopop_tau: float = REGISTERED
    dpop_lambda: float = REGISTERED
    tdpo_alpha: float = REGISTERED
    rpo_eta: float = REGISTERED
    simpo_gamma: float = REGISTERED
    cpo_alpha: float = REGISTERED

    def __post_init__(self) -> None:
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        names, combination = ", ".join(self.loss_type), self.combination()
        if problem := combination.problem():
            raise ConfigError(problem.words, problem.field)
        sorting = [row.name for row in combination.rows if row.averaged == "micro_batch"]
        if sorting and self.per_device_train_batch_size == 1:
            raise ConfigError(
                f"is 1, and {sorting[0]} sorts the pairs of a micro-batch, of which there would be one. Raise it, or "
                "take another loss.",
                "per_device_train_batch_size",
            )
        if combination.takes_divergence and self.wants_store():
            raise ConfigError(
                f"came, and {names} takes the reference's whole distribution at each token, where a store keeps one "
                "number. Leave the store out.",
                self._store_field,
            )
        if combination.takes_divergence and (self.reference == "none" or self.reference_method in ("remote", "store")):
            raise ConfigError(
                f"is {self.reference!r} (reference_method {self.reference_method!r}), and {names} takes the "
                "reference's whole distribution at each token. Take a reference that is run here: adapter_off, "
                "snapshot or model.",
                "reference",
            )
        if not combination.needs_reference:
            self._do_without_reference()
        super().__post_init__()

    def _do_without_reference(self) -> None:
        if self.reference not in (None, "none") or self.reference_method is not None:
            raise ConfigError(
                f"is {self.reference!r} (reference_method {self.reference_method!r}), and no loss among "
                f"{', '.join(self.loss_type)} compares with one. Leave them out; none is loaded or run.",
                "reference",
            )
        self.reference = "none"

    @property
    def objective_name(self) -> str:
        """The losses, for messages."""
        return f"loss {', '.join(self.loss_type)}"

    def combination(self) -> Combination:
        """The objective: losses, weights, options that take effect or were changed, and transforms."""
        losses = Combination(tuple(self.loss_type))
        return Combination(
            losses=losses.losses,
            weights=tuple(self.loss_weights or ()),
            options={} if losses.problem() else self.given_options(),
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            ld_alpha=self.ld_alpha,
            use_weighting=self.use_weighting,
        )
