"""Odds-ratio preference optimization: pairs without a reference."""

from __future__ import annotations

from dataclasses import dataclass

from tether.objectives.contrast import contrast_loss
from tether.training.algorithms.base import Algorithm, Needs
from tether.training.config import ReferenceFreeConfig
from tether.training.declaration import REGISTERED
from tether.training.step import Context, MicroBatch
from tether.training.trainer import ReferenceFreeTrainer
from tether.types import LossOutput, Scores, ScoringBatch


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


class ORPO(Algorithm[Scores]):
    """See `ORPOTrainer`."""

    config = ORPOConfig
    args: ORPOConfig

    @property
    def needs(self) -> Needs:
        """The prompts too, where the model writes them."""
        return Needs(columns=("weight",), prompts=not self.model_config.is_encoder_decoder)

    def loss_tokens(self, batch: ScoringBatch) -> int:
        """Tokens of prompts, without the first of each, and of chosen completions."""
        index = batch.completion_index
        return int(((index % 2 == 0) | (index >= 2 * batch.num_examples)).sum())

    def loss(self, policy: Scores, reference: Scores | None, part: MicroBatch, context: Context) -> LossOutput:
        """Likelihood and odds ratio."""
        batch = part.batch
        return contrast_loss(
            policy, loss="odds_ratio", pairs=batch.num_examples, values=batch.values, beta=self.args.beta
        )

    def describe(self) -> str:
        """What beta and the two averages are."""
        texts = "prompts and chosen completions" if self.needs.prompts else "chosen completions"
        return (
            f"objective: orpo (beta {self.args.beta:g}): likelihood averaged over the tokens of {texts} of a step; "
            "beta times the odds ratio of mean log-probs per token, averaged over pairs"
        )


class ORPOTrainer(ReferenceFreeTrainer):
    """Odds-ratio preference optimization: the likelihood of the chosen text and the odds of chosen over rejected.

    The likelihood is averaged over all tokens of a step, prompts included, as in the authors' code and in TRL; the
    odds ratio is averaged over pairs. Tokens of images, and prompts that an encoder reads, have no likelihood.

    Args:
        model: the policy; see `DPOTrainer` for all arguments. There is no reference.

    Reference:
        Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, arXiv:2403.07691.
    """

    args: ORPOConfig  # type: ignore[override]
    algorithm_class = ORPO
