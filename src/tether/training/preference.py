"""Trainers that learn from pairs."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import nn

from tether.errors import DataError
from tether.objectives import OBJECTIVES, Combination, preference_loss
from tether.scoring import Layout
from tether.training.distributions import ReferenceStates
from tether.training.dpo_arguments import DPOConfig
from tether.training.trainer import TetherTrainer
from tether.types import LossOutput, Scores, ScoringBatch


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
        ReferenceError: the reference is wrong, or nothing would train.

    Reference:
        Rafailov et al., Direct Preference Optimization, arXiv:2305.18290.
    """

    args: DPOConfig  # type: ignore[override]
    config = DPOConfig

    @cached_property
    def objective(self) -> Combination:
        """Losses, weights, options and transforms."""
        return self.args.combination()

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What scoring the policy gives besides log-probs: for metrics, and where the objective asks for more."""
        return (*super().outputs, *self.objective.outputs)

    @cached_property
    def _states(self) -> ReferenceStates:
        return ReferenceStates()

    def _proved(self, model: nn.Module, whose: str) -> tuple[Layout, Any]:
        layout, scorer = super()._proved(model, whose)
        return layout, self._states.kept_by(scorer) if self.objective.takes_divergence else scorer

    def _judge_batch(self, model: nn.Module, batch: ScoringBatch, mode: str | None) -> LossOutput:
        self._states.forget()
        return super()._judge_batch(model, batch, mode)

    def judge(self, policy: Scores, reference: Scores, batch: ScoringBatch) -> LossOutput:
        """The configured losses."""
        if self.objective.takes_divergence:
            policy = self._states.with_divergence(policy, self.policy)
        flat = self.resolved.reference.identity.meaning == "none"
        return preference_loss(
            policy, None if flat else reference, loss=self.objective, values=batch.values, sizes=batch.sizes
        )

    def loss_tokens(self, batch: ScoringBatch) -> int:
        """Tokens of chosen completions, where a loss is averaged over them."""
        averaged = any(row.averaged == "tokens" for row in self.objective.rows)
        return int((batch.completion_index % 2 == 0).sum()) if averaged else 0

    def check_rows(self, batch: ScoringBatch) -> None:
        """The rows are of the objective's kind, and have the margins that it needs or none that it ignores."""
        names = ", ".join(self.objective.losses)
        sizes = set(batch.sizes)
        if self.objective.kind == "pair" and sizes != {2}:
            raise DataError(f"{names} learns from pairs; the rows have {sorted(sizes)} completions.")
        needed = any(row.requires_margins for row in self.objective.rows)
        if needed and "margin" not in batch.values:
            raise DataError(f"{names} fits the reward gap of each pair; add a column `margin` to the rows.")
        if "margin" in batch.values and not self.objective.takes("margins"):
            raise DataError(
                f"The rows have a column `margin`, which {names} would ignore. Take it out, or use one of "
                f"{', '.join(row.name for row in OBJECTIVES['dpo'].values() if row.takes('margins'))}."
            )

    def couples_examples(self) -> bool:
        """The table's rows say it."""
        return any(row.averaged == "micro_batch" for row in self.objective.rows)

    def convention(self) -> str:
        """What the objective's options mean, in one line."""
        return self.objective.convention()
