"""Trainers that learn from pairs and compare with no reference."""

from __future__ import annotations

from tether.objectives.contrast import contrast_loss
from tether.scoring.batch import with_prompts
from tether.training.reference_free_arguments import CPOConfig, ORPOConfig
from tether.training.without_reference import ReferenceFreeTrainer
from tether.types import LossOutput, Scores, ScoringBatch


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
    config = ORPOConfig
    columns = ("weight",)

    def scored(self, batch: ScoringBatch) -> ScoringBatch:
        """The prompts too, where the model writes them."""
        return batch if self.data.encoder_decoder else with_prompts(batch)

    def loss_tokens(self, batch: ScoringBatch) -> int:
        """Tokens of prompts, without the first of each, and of chosen completions."""
        index = self.scored(batch).completion_index
        return int(((index % 2 == 0) | (index >= 2 * batch.num_examples)).sum())

    def judge(self, policy: Scores, reference: Scores, batch: ScoringBatch) -> LossOutput:
        """Likelihood and odds ratio."""
        return contrast_loss(
            policy, loss="odds_ratio", pairs=batch.num_examples, values=batch.values, beta=self.args.beta
        )

    def convention(self) -> str:
        """What beta and the two averages are, in one line."""
        texts = "chosen completions" if self.data.encoder_decoder else "prompts and chosen completions"
        return (
            f"objective: orpo (beta {self.args.beta:g}): likelihood averaged over the tokens of {texts} of a step; "
            "beta times the odds ratio of mean log-probs per token, averaged over pairs"
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
    config = CPOConfig
    columns = ("weight",)

    def loss_tokens(self, batch: ScoringBatch) -> int:
        """Tokens of chosen completions, where they count."""
        return int((batch.completion_index % 2 == 0).sum()) if self.args.cpo_alpha else 0

    def judge(self, policy: Scores, reference: Scores, batch: ScoringBatch) -> LossOutput:
        """The configured contrast, and the likelihood of the chosen completions."""
        return contrast_loss(
            policy,
            loss=self.args.loss_type,
            pairs=batch.num_examples,
            likelihood=self.args.cpo_alpha,
            alpha=self.args.alpha,
            values=batch.values,
            **self.args.objective_options(),
        )

    def convention(self) -> str:
        """What the options mean, in one line."""
        options = {**self.args.objective_options(), "cpo_alpha": self.args.cpo_alpha, "alpha": self.args.alpha}
        shown = ", ".join(f"{name} {value:g}" for name, value in options.items())
        level = "averaged over" if self.args.loss_type in ("ipo", "simpo") else "summed over"
        return (
            f"objective: cpo, {self.args.loss_type} ({shown}): log-probs {level} completion tokens; cpo_alpha times "
            "the likelihood, averaged over the chosen tokens of a step"
        )
