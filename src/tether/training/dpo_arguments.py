"""Configuration of `DPOTrainer`: the objective and its options, over what every preference trainer takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tether.errors import ConfigError
from tether.objectives import Combination
from tether.training.arguments import PreferenceConfig
from tether.types import Kind

# Options of single losses that have a field here; a loss that takes one gets its value, and where no loss does, only
# the default may stand.
LOSS_OPTIONS = (
    "beta",
    "label_smoothing",
    "discopop_tau",
    "dpop_lambda",
    "tdpo_alpha",
    "rpo_eta",
    "simpo_gamma",
    "cpo_alpha",
)


@dataclass
class DPOConfig(PreferenceConfig):
    """Configuration of `DPOTrainer`; names and defaults as in TRL 1.16, and options of the objectives TRL has not.

    What each loss is, and which options it takes: docs/choosing_an_objective.md.

    Args:
        loss_type: one or several names in `tether.objectives.OBJECTIVES`, for pairs or for ranked lists.
        loss_weights: one for each of several losses; None: 1 each.
        beta: how strongly the policy is held to the reference, per nat; above 0. Its scale depends on the loss.
        label_smoothing: chance that a label is wrong, from 0 to below 0.5; above 0 for `exo_pair`.
        f_divergence_type: what holds the policy to the reference: `reverse_kl`, `forward_kl`, `js_divergence` or
            `alpha_divergence`.
        f_alpha_divergence_coef: exponent of `alpha_divergence`; None: 0.5.
        ld_alpha: weight, from 0 to 1, of the tokens by which a completion is longer than the other (LD-DPO); None: all
            count alike.
        use_weighting: weigh each pair by how likely the policy would have written it (WPO).
        discopop_tau: temperature of `discopop`.
        dpop_lambda: weight of the penalty of `dpop`.
        tdpo_alpha: weight of the difference of KLs in `tdpo2`.
        rpo_eta: scale of the reward gap that `rpo` fits.
        simpo_gamma: lead of the reward that `simpo` aims at.
        cpo_alpha: weight of the likelihood in `cpo`.

    Raises:
        ConfigError: an unknown loss, an option outside its range or without effect, or options that have no meaning
            together.
    """

    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float | None = None
    ld_alpha: float | None = None
    use_weighting: bool = False
    discopop_tau: float = 0.05
    dpop_lambda: float = 50.0
    tdpo_alpha: float = 0.5
    rpo_eta: float = 1.0
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0

    def __post_init__(self) -> None:
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        combination = self.combination()
        problem = combination.problem()
        if problem:
            raise ConfigError(problem)
        if combination.kind not in ("pair", "ranked"):
            raise ConfigError(
                f"loss_type {self.loss_type[0]!r} learns from {combination.kind} data; DPOTrainer takes losses of "
                "pairs and of ranked lists."
            )
        sorting = [row.name for row in combination.rows if row.averaged == "micro_batch"]
        if sorting and self.per_device_train_batch_size == 1:
            raise ConfigError(
                f"per_device_train_batch_size is 1, and {sorting[0]} sorts the pairs of a micro-batch, of which there "
                "would be one. Raise it, or take another loss."
            )
        if combination.takes_divergence and self.wants_store():
            raise ConfigError(
                f"reference_store or precompute_ref_log_probs came, and {', '.join(self.loss_type)} takes the "
                "reference's whole distribution at each token, where a store keeps one number. Leave the store out."
            )
        if combination.takes_divergence and (self.reference == "none" or self.reference_means in ("remote", "store")):
            raise ConfigError(
                f"reference is {self.reference!r} (reference_means {self.reference_means!r}), and "
                f"{', '.join(self.loss_type)} takes the reference's whole distribution at each token. Take a reference "
                "that is run here: adapter_off, snapshot or model."
            )
        if not combination.needs_reference:
            self._do_without_reference()
        super().__post_init__()

    def _do_without_reference(self) -> None:
        if self.reference not in (None, "none") or self.reference_means is not None:
            raise ConfigError(
                f"reference is {self.reference!r} (reference_means {self.reference_means!r}), and no loss among "
                f"{', '.join(self.loss_type)} compares with one. Leave them out; none is loaded or run."
            )
        self.reference = "none"

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        """What the rows are read as: pairs, or ranked lists."""
        return self.combination().kind

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses compares with a reference."""
        return self.combination().needs_reference

    @property
    def objective_name(self) -> str:
        """The losses, for messages."""
        return f"loss {', '.join(self.loss_type)}"

    def combination(self) -> Combination:
        """The objective: losses, weights, options that take effect or were changed, and transforms."""
        defaults = {field.name: field.default for field in dataclasses.fields(DPOConfig)}
        losses = Combination(tuple(self.loss_type))
        known = losses.problem() is None
        given = {name: getattr(self, name) for name in LOSS_OPTIONS}
        return Combination(
            losses=losses.losses,
            weights=tuple(self.loss_weights or ()),
            options={
                name: value
                for name, value in given.items()
                if value != defaults[name] or (known and any(name in row.options for row in losses.rows))
            },
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            ld_alpha=self.ld_alpha,
            use_weighting=self.use_weighting,
        )
