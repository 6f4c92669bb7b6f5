"""Direct preference optimization and its family: pairs and ranked lists against a reference."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from tether.errors import DataError
from tether.objectives import OBJECTIVES, Combination, preference_loss
from tether.scoring.divergence import token_divergence
from tether.training.algorithms.base import Algorithm, Needs
from tether.training.dpo_arguments import DPOConfig
from tether.training.step import Context, MicroBatch
from tether.training.trainer import TetherTrainer
from tether.types import LossOutput, Scores, ScoringBatch


class DPO(Algorithm[Scores]):
    """The losses of pairs and ranked lists in the registry, alone or combined."""

    config = DPOConfig
    args: DPOConfig

    @cached_property
    def objective(self) -> Combination:
        """Losses, weights, options and transforms."""
        return self.args.combination()

    @property
    def needs(self) -> Needs:
        """What the losses take, and for a KL per token the states before both heads."""
        objective = self.objective
        return Needs(
            columns=("margin", "weight") if objective.takes("margins") else ("weight",),
            policy=(*Needs.policy, *objective.outputs),
            reference=("hidden",) if objective.takes_divergence else (),
            whole_batch=any(row.averaged == "micro_batch" for row in objective.rows),
        )

    @property
    def name(self) -> str:
        """The losses."""
        return ", ".join(self.objective.losses)

    def check_rows(self, batch: ScoringBatch) -> None:
        """The rows are of the objective's kind, and have the margins that it needs or none that it ignores."""
        sizes = set(batch.sizes)
        if self.objective.kind == "pair" and sizes != {2}:
            raise DataError(f"{self.name} learns from pairs; the rows have {sorted(sizes)} completions.")
        needed = any(row.requires_margins for row in self.objective.rows)
        if needed and "margin" not in batch.values:
            raise DataError(f"{self.name} fits the reward gap of each pair; add a column `margin` to the rows.")
        if "margin" in batch.values and "margin" not in self.needs.columns:
            raise DataError(
                f"The rows have a column `margin`, which {self.name} would ignore. Remove it, or use one of "
                f"{', '.join(row.name for row in OBJECTIVES['dpo'].values() if row.takes('margins'))}."
            )

    def loss_tokens(self, batch: ScoringBatch) -> int:
        """Tokens of chosen completions, where a loss is averaged over them."""
        averaged = any(row.averaged == "tokens" for row in self.objective.rows)
        return int((batch.completion_index % 2 == 0).sum()) if averaged else 0

    def loss(self, policy: Scores, reference: Scores | None, part: MicroBatch, context: Context) -> LossOutput:
        """The configured losses."""
        divergence = None
        if self.objective.takes_divergence and reference is not None:
            divergence = token_divergence(reference, policy)
            policy = replace(policy, hidden=None, head=None)
        batch = part.batch
        return preference_loss(
            policy, reference, loss=self.objective, values=batch.values, sizes=batch.sizes, divergence=divergence
        )

    def describe(self) -> str:
        """What the objective's options mean."""
        return self.objective.convention()


class DPOTrainer(TetherTrainer):
    """Direct preference optimization; arguments as in TRL 1.16.

    Args:
        model: the policy: a name, a folder, a .gguf file, or a model in memory (which is then the start; disk is not
            read).
        ref_model: another model as the reference; left out, the reference is what `args.reference` says, by default the
            policy at the start.
        args: `DPOConfig`.
        data_collator: makes `{"batch": ScoringBatch}` of prepared rows; left out, they are packed.
        train_dataset: rows with `prompt`, `chosen` and `rejected`: a `datasets.Dataset`, a list, a path or a hub name.
        eval_dataset: the same, or a dictionary of several sets.
        processing_class: the tokenizer, or the processor of a model that sees images; left out, it is loaded from the
            model's source.
        callbacks: further transformers callbacks.
        optimizers: an optimizer and a scheduler in place of those that `args` describe.
        quantization_config: of transformers, for a model that is named; the same as in `model_init_kwargs`.
        peft_config: a PEFT configuration; adds a new adapter to the model.

    Raises:
        ConfigError, DataError: before any weights are loaded, where that is possible.
        ReferencePolicyError: the reference is wrong, or nothing would train.

    Reference:
        Rafailov et al., Direct Preference Optimization, arXiv:2305.18290.
    """

    args: DPOConfig  # type: ignore[override]
    algorithm_class = DPO
