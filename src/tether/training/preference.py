"""Trainers that learn from pairs."""

from __future__ import annotations

from tether.objectives import OBJECTIVES, preference_loss
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
        processing_class: the tokenizer; left out, it is loaded from the model's source.
        callbacks: further transformers callbacks.
        optimizers: an optimizer and a scheduler in place of those that `args` describe.
        peft_config: a PEFT configuration; adds a new adapter to the model.

    Raises:
        ConfigError, DataError: before any weights are loaded, where that is possible.
        ReferenceError: the reference is wrong, or nothing would train.

    Reference:
        Rafailov et al., Direct Preference Optimization, arXiv:2305.18290.
    """

    args: DPOConfig  # type: ignore[override]
    config = DPOConfig

    def judge(self, policy: Scores, reference: Scores, batch: ScoringBatch) -> LossOutput:
        """The configured pair loss."""
        return preference_loss(policy, reference, loss=str(self.args.loss_type), **self.args.objective_options())

    def convention(self) -> str:
        """What the objective's options mean, in one line."""
        options = ", ".join(f"{name} {value:g}" for name, value in self.args.objective_options().items())
        row = OBJECTIVES[str(self.args.loss_type)]
        return f"objective: {row.name} ({options}): {row.convention}"
