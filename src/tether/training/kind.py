"""What one kind of trainer says of itself; `TetherTrainer` asks, and does all that the kinds share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from torch import nn

from tether.data import Prepared
from tether.data.prepare.stream import Arrange
from tether.errors import DataError
from tether.scoring import score
from tether.scoring.layout.proof import LOG_PROBS, Measures
from tether.training.batching import MicroBatch
from tether.training.config import PreferenceConfig
from tether.training.setup import policy_spec, with_adapter
from tether.types import LossOutput, Scores, ScoringBatch


class TrainerKind:
    """`config`, `judge` and `convention` must be defined; the rest may be."""

    config: ClassVar[type[PreferenceConfig]] = PreferenceConfig
    # Columns of numbers that the objective makes use of; see `tether.types.Preference`.
    columns: ClassVar[tuple[str, ...]] = ()
    # What scoring the policy gives besides log-probabilities.
    outputs: tuple[str, ...] = ("entropy", "top1", "mean_logits")
    # The function that scores a batch, and what its layout is proved by.
    scoring: Callable[..., Any] = staticmethod(score)
    measures: Measures = LOG_PROBS

    def judge(self, policy: Scores, reference: Scores, batch: ScoringBatch) -> LossOutput:
        """Combine the policy's scores with the reference's; each kind of trainer says how."""
        raise TypeError(f"{type(self).__name__} does not say how it judges; derive it from a trainer that does.")

    def check_rows(self, batch: ScoringBatch) -> None:
        """Refuse rows that the objective cannot use as they are, by the first few of the training set."""
        ignored = sorted(set(batch.values) - set(self.columns))
        if ignored:
            raise DataError(
                f"The rows have a column `{ignored[0]}`, which {type(self).__name__} would ignore. Take it out; "
                f"made use of is {', '.join(f'`{name}`' for name in self.columns) or 'none of such numbers'}."
            )

    def loss_tokens(self, batch: ScoringBatch) -> int:
        """How many losses `judge` will give in `LossOutput.per_token`: the step's denominator, known before scoring."""
        return 0

    def couples_examples(self) -> bool:
        """Whether the loss of an example depends on the others it is scored with, so that a batch must stay whole."""
        return False

    def convention(self) -> str:
        """What the objective is and what its options mean, in one line; each kind of trainer says it."""
        raise TypeError(f"{type(self).__name__} does not say its convention; derive it from a trainer that does.")

    def check_model(self, model: str | Path | nn.Module, config: Any, args: Any) -> None:
        """Refuse a model that the objective cannot train, by its configuration, before rows are read or weights load.

        Args:
            model: as the trainer was given it.
            config: its configuration.
            args: the trainer's.
        """

    def arrange(self, prepared: Prepared, args: Any) -> Prepared:
        """Change prepared rows before they are packed; `args` is the trainer's configuration."""
        return prepared

    def arrange_chunks(self, args: Any) -> Arrange:
        """The same for a stream: what changes the rows of one pass over it, a chunk after the other."""
        return lambda table: table

    def load_model(self, source: str, args: Any) -> nn.Module:
        """Load a policy that was named by a string."""
        return policy_spec(source, args).load_base()

    def scored(self, batch: ScoringBatch) -> ScoringBatch:
        """What is scored of a batch, where that is more than its completions."""
        return batch

    def add_adapter(self, policy: nn.Module, peft_config: PeftConfig | None, args: Any) -> nn.Module:
        """Add the adapter that was asked for."""
        return with_adapter(policy, peft_config, args)

    def before_step(self, batches: list[MicroBatch]) -> None:
        """See all micro-batches of this process' share in an optimizer step, before the first is judged."""

    def trained_tokens(self, batch: ScoringBatch) -> int:
        """Tokens that count as trained on: a prompt with each of its completions, as TRL counts `num_tokens`."""
        return sum(batch.sequence_lengths)

    def completed(self, means: dict[str, float], mode: str) -> dict[str, float]:
        """Add to the means of a log (`mode` is train) or an evaluation (eval) what follows from them."""
        return means

    def objective_state(self) -> dict[str, float]:
        """What the objective has learnt besides weights; a checkpoint holds it."""
        return {}

    def restore_objective(self, state: dict[str, float]) -> None:
        """Take `objective_state` of a checkpoint; empty for a fresh start."""
