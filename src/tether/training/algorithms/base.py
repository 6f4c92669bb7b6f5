"""What an algorithm says of itself; the trainer asks, and does all that algorithms share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import pyarrow as pa
import torch
from accelerate import Accelerator
from peft import PeftConfig
from torch import Tensor, nn

from tether.data import Prepared
from tether.data.show import Counted
from tether.errors import DataError, TetherError
from tether.models import load_policy
from tether.scoring import score
from tether.scoring.layout.proof import LOG_PROBS, Measures
from tether.training.config import PreferenceConfig
from tether.training.setup.data import RunData
from tether.training.setup.policy import policy_spec
from tether.training.source import Source
from tether.training.step import Context, MicroBatch, Step
from tether.types import LossOutput, Scores, ScoringBatch

# What the policy's pass gives: `Scores`, or the rewards of completions.
Answer = TypeVar("Answer")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Needs:
    """What an algorithm needs of the rows and of the two passes over them.

    Args:
        columns: columns of numbers that the loss makes use of; see `tether.types.Preference`.
        policy: what scoring the policy gives besides log-probabilities.
        reference: the same of the reference.
        prompts: the prompts are scored too.
        whole_batch: the loss of an example depends on the others that it is computed with, so that batches stay whole.
    """

    columns: tuple[str, ...] = ()
    policy: tuple[str, ...] = ("entropy", "top1", "mean_logits")
    reference: tuple[str, ...] = ()
    prompts: bool = False
    whole_batch: bool = False


@dataclass(frozen=True)
class Passes:
    """What an algorithm may ask of a run before the micro-batches of a step are computed.

    Args:
        policy: scores of a batch by the policy as it is, without gradient; with further `outputs` as `score` has them.
        reference: the same by the reference; None where there is none.
        accelerator: of the run's processes.
        model: the policy, outside wrappers of data parallelism.
        split: a batch into micro-batches, as the steps split it; each process has to call.
        state: of transformers' trainer.
    """

    policy: Callable[..., Scores]
    reference: Callable[[ScoringBatch], Scores | None]
    accelerator: Accelerator
    model: Callable[[], nn.Module]
    split: Callable[[ScoringBatch], list[MicroBatch]]
    state: Callable[[], Any]

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes; each has to call."""
        return cast(Tensor, self.accelerator.reduce(tensor, reduction="sum"))

    def gather(self, tensor: Tensor) -> Tensor:
        """A tensor of all processes, one after another; each has to call, with as many rows."""
        return cast(Tensor, self.accelerator.gather(tensor))

    def everywhere(self, held: bool) -> bool:
        """Whether something holds in all processes; each has to call."""
        return bool(self.gather(torch.tensor([float(held)], device=self.accelerator.device)).all())

    def together(self, call: Callable[[], Result], what: str, error: type[TetherError]) -> Result:
        """Do something in each process; where one fails all do, so that none waits for it.

        Args:
            call: what is done; no process may need another in it.
            what: it is called in the message of those that did not fail.
            error: that these raise.
        """
        found: list[Result] = []
        problem: Exception | None = None
        try:
            found.append(call())
        except Exception as raised:
            problem = raised
        failed = self.gather(torch.tensor([float(problem is not None)], device=self.accelerator.device))
        if problem is not None:
            raise problem
        if failed.any():
            raise error(f"{what} failed in process {int(failed.argmax())}; its message is there.")
        return found[0]


class Algorithm(ABC, Generic[Answer]):
    """`loss` and `describe` must be defined; the rest may be.

    Args:
        args: the run's configuration.
        model_config: the configuration of the model.
    """

    config: ClassVar[type[PreferenceConfig]] = PreferenceConfig
    # The function that scores a batch by the policy, and what its layout is proved by.
    scoring: Callable[..., Any] = staticmethod(score)
    measures: Measures = LOG_PROBS
    # The pass over a micro-batch of an evaluation asks the reference too; else it has spoken before.
    scores_reference: ClassVar[bool] = True
    # A step may have no gradient at all, as where the rewards of every group are equal.
    still_steps: ClassVar[bool] = False

    def __init__(self, args: Any, model_config: Any) -> None:
        self.args, self.model_config = args, model_config

    @property
    def needs(self) -> Needs:
        """What it needs of rows and passes."""
        return Needs()

    @property
    def counted(self) -> Counted:
        """What of a row the loss is of, as `tether data show` shows it."""
        return "texts" if self.needs.prompts else "completions"

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return type(self).__name__

    # -- before a run ------------------------------------------------------------------------------------------------

    def check_model(self, model: str | Path | nn.Module) -> None:
        """Refuse a model that cannot be trained so, by its configuration, before rows are read or weights load."""

    def rows(self, prepared: Prepared) -> Prepared:
        """Change prepared rows before they are packed."""
        return prepared

    def chunks(self) -> Callable[[pa.Table], pa.Table]:
        """The same for a stream: what changes the rows of one pass over it, a chunk after the other."""
        return lambda table: table

    def source(self, source: Source, data: RunData) -> Source:
        """What gives the batches, from the prepared training rows; before any weights load."""
        return source

    def attach(self, passes: Passes) -> None:
        """Take what may be asked of the run, when it is put together."""

    def load_model(self, source: str) -> nn.Module:
        """Load a policy that was named by a string."""
        return policy_spec(source, self.args).load_base()

    def load_saved(self, source: str, **options: Any) -> nn.Module:
        """Load a policy that was saved, or its base; `options` as for `load_policy`."""
        return load_policy(source, **options)

    def adapter(self, peft_config: PeftConfig | None) -> PeftConfig | None:
        """The adapter that was asked for, changed where it has to be."""
        return peft_config

    def prepare_model(self, model: nn.Module, tokenizer: Any) -> None:
        """Set what the model's forward depends on; before it is proved."""

    def check_rows(self, batch: ScoringBatch) -> None:
        """Refuse rows that the loss cannot use as they are, by the first few of the training set."""
        ignored = sorted(set(batch.values) - set(self.needs.columns))
        if ignored:
            used = ", ".join(f"`{name}`" for name in self.needs.columns) or "no such column"
            raise DataError(
                f"The rows have a column `{ignored[0]}`, which {self.name} would ignore; it uses {used}. Remove the "
                "column."
            )

    @abstractmethod
    def describe(self) -> str:
        """What the objective is and what its options mean, in one line."""

    # -- steps -------------------------------------------------------------------------------------------------------

    def loss_tokens(self, batch: ScoringBatch) -> int:
        """How many losses `loss` will give in a term over tokens: the step's denominator, known before scoring."""
        return 0

    def trained_tokens(self, batch: ScoringBatch) -> int:
        """Tokens that count as trained on: a prompt with each of its completions, as TRL counts `num_tokens`."""
        return sum(batch.sequence_lengths)

    def reference(self, part: MicroBatch, context: Context, score: Callable[[], Scores | None]) -> Scores | None:
        """Scores of a micro-batch by the reference.

        Args:
            part: the micro-batch, on the CPU or where it is computed.
            context: what `begin_step`, or `begin_evaluation`, returned.
            score: computes them.
        """
        return context.references[part] if part in context.references else score()

    def begin_step(self, step: Step, passes: Passes) -> Context:
        """See all micro-batches of this process' share in an optimizer step, before the first is computed."""
        return Context()

    @abstractmethod
    def loss(self, policy: Answer, reference: Scores | None, part: MicroBatch, context: Context) -> LossOutput:
        """Combine the policy's scores with the reference's.

        Args:
            policy: of the micro-batch.
            reference: of the same; None where there is none.
            part: the micro-batch, on the run's device.
            context: what `begin_step`, or `begin_evaluation`, returned.
        """

    def completion_values(self, policy: Answer, reference: Scores | None) -> dict[str, Tensor]:
        """Numbers of each completion, `[K]` or more, for `compute_metrics`."""
        scores = cast(Scores, policy)
        values = {"logps": scores.logps}
        ratios = scores.logps
        if reference is not None:
            values["reference_logps"] = reference.logps
            ratios = ratios - reference.logps
        beta = getattr(self.args, "beta", None)
        return values if beta is None else {**values, "rewards": beta * ratios}

    def predictions(self, policy: Answer, reference: Scores | None, batch: ScoringBatch) -> dict[str, Tensor]:
        """The same of each example: of pairs `chosen_…` and `rejected_…`, of lists `[B, K]`.

        Raises:
            DataError: lists of several lengths, whose numbers are no table.
        """
        sizes = set(batch.sizes)
        if len(sizes) != 1:
            raise DataError(
                f"compute_metrics takes a table of numbers, and the rows have {sorted(sizes)} completions each. Leave "
                "compute_metrics out, or evaluate lists of one length."
            )
        (size,), found = sizes, {}
        for name, values in self.completion_values(policy, reference).items():
            table = values.detach()[: len(batch.branches)].view(-1, size)
            if size == 2 and self.args.kind == "pair":
                of, plain = ("reference_", name[10:]) if name.startswith("reference_") else ("", name)
                found |= {f"{of}chosen_{plain}": table[:, 0], f"{of}rejected_{plain}": table[:, 1]}
            else:
                found[name] = table[:, 0] if size == 1 else table
        return found

    def end_step(self, context: Context, passes: Passes) -> None:
        """The last micro-batch of a step was computed."""

    def complete(self, means: dict[str, float]) -> dict[str, float]:
        """Add to the means of a log or an evaluation what follows from them."""
        return means

    def begin_evaluation(self, passes: Passes) -> Context:
        """See that an evaluation begins."""
        return Context()

    def end_evaluation(self, context: Context, means: dict[str, float]) -> dict[str, float]:
        """Change the means of an evaluation by what only its end tells."""
        return means

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, float]:
        """What it has learnt besides weights; a checkpoint holds it."""
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        """Take `state` of a checkpoint; empty for a fresh start."""
