"""Contrastive preference optimization, SimPO and AlphaPO: pairs without a reference."""

from __future__ import annotations

from dataclasses import dataclass

from tether.errors import ConfigError
from tether.objectives.contrast import contrast_loss
from tether.training.algorithms.base import Algorithm, Needs
from tether.training.config import ReferenceFreeConfig
from tether.training.declaration import REGISTERED, losses_of, option
from tether.training.step import Context, MicroBatch
from tether.training.trainer import ReferenceFreeTrainer
from tether.types import LossOutput, Scores, ScoringBatch


@dataclass
class CPOConfig(ReferenceFreeConfig, algorithm="cpo"):
    """Configuration of `CPOTrainer`; names and defaults as in TRL 1.16.

    Raises:
        ConfigError: an unknown loss, an option outside its range, or one that does not apply to the loss.
    """

    loss_type: str = option(
        "sigmoid",
        f"{losses_of('cpo')} (which stands for `simpo` with `cpo_alpha=0`).",
        key="objective.loss",
    )
    beta: float = REGISTERED
    label_smoothing: float = REGISTERED
    cpo_alpha: float = REGISTERED
    simpo_gamma: float = REGISTERED
    alpha: float = REGISTERED

    def __post_init__(self) -> None:
        if self.loss_type == "alphapo":
            if self.cpo_alpha not in (type(self).cpo_alpha, 0.0):
                raise ConfigError(
                    f"is {self.cpo_alpha!r}, and loss 'alphapo' stands for 'simpo' with cpo_alpha 0. Leave it out, or "
                    "set loss_type to simpo.",
                    "cpo_alpha",
                )
            self.loss_type, self.cpo_alpha = "simpo", 0.0
        self.check_objective()
        super().__post_init__()


class CPO(Algorithm[Scores]):
    """See `CPOTrainer`."""

    config = CPOConfig
    args: CPOConfig

    @property
    def needs(self) -> Needs:
        """Pairs, which may have weights."""
        return Needs(columns=("weight",))

    def loss_tokens(self, batch: ScoringBatch) -> int:
        """Tokens of chosen completions, where they count."""
        return int((batch.completion_index % 2 == 0).sum()) if self.args.cpo_alpha else 0

    def loss(self, policy: Scores, reference: Scores | None, part: MicroBatch, context: Context) -> LossOutput:
        """The configured contrast, and the likelihood of the chosen completions."""
        return contrast_loss(
            policy,
            loss=self.args.loss_type,
            pairs=part.batch.num_examples,
            likelihood=self.args.cpo_alpha,
            alpha=self.args.alpha,
            values=part.batch.values,
            **self.args.objective_options(),
        )

    def describe(self) -> str:
        """What the options mean."""
        options = {**self.args.objective_options(), "cpo_alpha": self.args.cpo_alpha, "alpha": self.args.alpha}
        shown = ", ".join(f"{name} {value:g}" for name, value in options.items())
        (row,) = self.args.objective_rows
        level = "averaged over" if row.per_token else "summed over"
        return (
            f"objective: cpo, {self.args.loss_type} ({shown}): log-probs {level} completion tokens; cpo_alpha times "
            "the likelihood, averaged over the chosen tokens of a step"
        )


class CPOTrainer(ReferenceFreeTrainer):
    """Contrastive preference optimization, SimPO and AlphaPO: pairs without a reference, beside a likelihood.

    Args:
        model: the policy; see `DPOTrainer` for all arguments. There is no reference.

    Reference:
        Xu et al., Contrastive Preference Optimization, arXiv:2401.08417; Meng et al., SimPO: Simple Preference
        Optimization with a Reference-Free Reward, arXiv:2405.14734.
    """

    args: CPOConfig  # type: ignore[override]
    algorithm_class = CPO
