"""Kahneman-Tversky optimization and similar: single judged completions against a reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import pyarrow as pa
import torch
from torch import Tensor

from tether.data import Prepared
from tether.objectives import OBJECTIVES
from tether.objectives.unpaired_loss import is_balanced, log_ratios, suggested_weights, unpaired_loss
from tether.training.algorithms.base import Algorithm, Needs, Passes
from tether.training.algorithms.kto_mismatch import Mismatching, with_mismatched
from tether.training.config import PreferenceConfig
from tether.training.declaration import REGISTERED, losses_of, option
from tether.training.step import Context, MicroBatch, Step
from tether.training.trainer import TetherTrainer
from tether.types import LossOutput, Scores, ScoringBatch

logger = logging.getLogger("tether")


@dataclass(frozen=True)
class Baselines(Context):
    """What the losses of a step are measured from.

    Args:
        baseline: nats; None where the step's one micro-batch gives it.
        total: sum over processes.
        evaluating: whether the rows are evaluated; `kto` then knows its baseline only at the end.
        seen: of each micro-batch: while training log-ratios, while evaluating also labels and weights, `[B, 3]`.
    """

    baseline: Tensor | None = None
    total: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)
    evaluating: bool = False
    seen: list[Tensor] = field(default_factory=list)


@dataclass
class KTOConfig(PreferenceConfig, algorithm="kto"):
    """Configuration of `KTOTrainer`; names and defaults as in TRL 1.16.

    Rows may be drawn in any order: unlike TRL's, the pairing for the KL estimate does not hang on it.

    Raises:
        ConfigError: an unknown loss, or an option outside its range.
    """

    loss_type: str = option("kto", f"{losses_of('kto')}.", key="objective.loss")
    beta: float = REGISTERED
    desirable_weight: float = REGISTERED
    undesirable_weight: float = REGISTERED

    def __post_init__(self) -> None:
        self.check_objective()
        super().__post_init__()


class KTO(Algorithm[Scores]):
    """`kto`, `apo_zero_unpaired` and `bco`; see `KTOTrainer`."""

    config = KTOConfig
    args: KTOConfig

    @property
    def needs(self) -> Needs:
        """Labels, and weights of rows."""
        return Needs(columns=("label", "weight"))

    def __init__(self, args: KTOConfig, model_config: Any) -> None:
        super().__init__(args, model_config)
        (row,) = args.objective_rows
        # What the loss's baseline is a mean of: other rows' completions under each prompt, or rows of earlier steps.
        self._by_mismatched, self._by_earlier = row.takes("mismatched_mean"), row.takes("running_mean")
        self._branches = 2 if self._by_mismatched else 1
        self._balance_said = False
        self.load_state({})

    @cached_property
    def _options(self) -> Mapping[str, float]:
        return self.args.objective_options()

    def state(self) -> dict[str, float]:
        """BCO's running mean, as a sum of log-ratios and a count of rows; empty for other losses."""
        return dict(zip(("sum", "count"), self._earlier.tolist(), strict=True)) if self._by_earlier else {}

    def load_state(self, state: dict[str, float]) -> None:
        """Start, or go on with, BCO's running mean."""
        # On the CPU in float64, as a checkpoint holds it: a resumed run has the same numbers to the last digit.
        self._earlier = torch.tensor([state.get("sum", 0.0), state.get("count", 0.0)], dtype=torch.float64)

    def rows(self, prepared: Prepared) -> Prepared:
        """Say how the classes are balanced, and add the completions of the KL estimate."""
        if prepared.report.name == "train":
            self._say_balance(prepared.dataset["label"])
        return with_mismatched(prepared, self.args.max_length) if self._by_mismatched else prepared

    def chunks(self) -> Callable[[pa.Table], pa.Table]:
        """The same of a stream, whose classes are counted in its first chunk."""
        pairing = Mismatching(self.args.max_length, "train") if self._by_mismatched else None

        def change(table: pa.Table) -> pa.Table:
            if not self._balance_said:
                self._say_balance(table["label"].to_pylist())
            return table if pairing is None else pairing(table)

        return change

    def predictions(self, policy: Scores, reference: Scores | None, batch: ScoringBatch) -> dict[str, Tensor]:
        """Numbers of each row's own completion, and its label."""
        values = self.completion_values(policy, reference)
        found = {name: one.detach()[:: self._branches] for name, one in values.items()}
        return {**found, "label": batch.values["label"]}

    def trained_tokens(self, batch: ScoringBatch) -> int:
        """Tokens of each prompt with its own completion."""
        return sum(batch.sequence_lengths[:: self._branches])

    def begin_step(self, step: Step, passes: Passes) -> Baselines:
        """The baseline; of a step of several micro-batches, `kto` finds it by scoring all of them beforehand."""
        if self._by_earlier:
            return Baselines(baseline=self._running_mean())
        if not self._by_mismatched:
            return Baselines(baseline=torch.zeros(()))
        if len(step.parts) == 1:
            return Baselines(total=passes.total)
        references, found = {}, torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for part in step.parts:
            batch = part.batch.to(self.args.device)
            references[part] = passes.reference(batch)
            logratios = _log_ratios_by_token(passes.policy(batch), references[part])
            if part.counts:
                found += _sum_and_count_of_mismatched(logratios)
        return Baselines(references, baseline=_mean(passes.total(found)).clamp(min=0))

    def begin_evaluation(self, passes: Passes) -> Baselines:
        """The running mean; `kto` knows its own baseline only at the end."""
        baseline = self._running_mean() if self._by_earlier else torch.zeros(())
        return Baselines(baseline=baseline, total=passes.total, evaluating=True)

    def loss(self, policy: Scores, reference: Scores | None, part: MicroBatch, context: Context) -> LossOutput:
        """The configured loss of single completions."""
        context, values = cast(Baselines, context), part.batch.values
        desirable, weights = values["label"] > 0.5, values.get("weight")
        logratios = log_ratios(policy, reference).detach()
        baseline = self._baseline(logratios, part, context).to(logratios)
        if context.evaluating:
            factors = torch.ones_like(values["label"]) if weights is None else weights
            context.seen.append(torch.stack([logratios[:: self._branches], desirable, factors], dim=1))
        elif part.counts:
            context.seen.append(logratios)
        output = unpaired_loss(
            policy,
            reference,
            desirable,
            loss=self.args.loss_type,
            baseline=baseline,
            branches=self._branches,
            weights=weights,
            **self._options,
        )
        rows = torch.tensor(float(len(desirable)), device=logratios.device)
        if self._by_earlier:
            output.metrics["delta"] = (self.args.beta * baseline * rows, rows)
        elif self._by_mismatched:
            shown = tuple(_sum_and_count_of_mismatched(logratios)) if context.evaluating else (baseline * rows, rows)
            output.metrics["kl"] = cast(tuple[Tensor, Tensor], shown)
        return output

    def _baseline(self, logratios: Tensor, part: MicroBatch, context: Baselines) -> Tensor:
        if context.baseline is not None:
            return context.baseline
        # A batch that does not count takes part in the sum of the others.
        found = _sum_and_count_of_mismatched(logratios)
        return _mean(context.total(found if part.counts else torch.zeros_like(found))).clamp(min=0)

    def _running_mean(self) -> Tensor:
        total, count = self._earlier.tolist()
        return torch.tensor(total / count if count else 0.0)

    def end_step(self, context: Context, passes: Passes) -> None:
        """Add the step's rows, of all processes, to BCO's running mean."""
        if not self._by_earlier:
            return
        new = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for logratios in cast(Baselines, context).seen:
            new += torch.stack([logratios.double().sum(), logratios.new_tensor(float(len(logratios))).double()])
        self._earlier = self._earlier + passes.total(new).cpu()

    def complete(self, means: dict[str, float]) -> dict[str, float]:
        """The margin between the classes."""
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    def end_evaluation(self, context: Context, means: dict[str, float]) -> dict[str, float]:
        """KTO's loss with the baseline of the whole set."""
        context = cast(Baselines, context)
        if self._by_mismatched:
            means["kl"] = max(0.0, means["kl"])
            rows = torch.cat([torch.zeros(0, 3, device=self.args.device), *context.seen]).double()
            loss = OBJECTIVES["kto"]["kto"]
            losses = rows[:, 2] * loss(rows[:, 0], rows[:, 1] > 0.5, means["kl"], **self._options)
            before = context.total(torch.stack([losses.sum(), losses.new_tensor(float(len(losses)))]))
            means["loss"] = _mean(before).item()
        return means

    def describe(self) -> str:
        """What the objective's options mean."""
        options = ", ".join(f"{name} {value:g}" for name, value in self._options.items())
        return f"objective: {self.args.loss_type} ({options}): {OBJECTIVES['kto'][self.args.loss_type].convention}"

    def _say_balance(self, labels: Any) -> None:
        self._balance_said = True
        args, desirable = self.args, int(sum(labels))
        undesirable = len(labels) - desirable
        counts = f"labels: {desirable} desirable and {undesirable} undesirable rows"
        weights = suggested_weights(desirable, undesirable)
        if weights is None or is_balanced(desirable, undesirable, args.desirable_weight, args.undesirable_weight):
            logger.info(counts)
            return
        (low, high), (other_low, other_high) = weights
        logger.warning(
            f"{counts}; their weights {args.desirable_weight:g} and {args.undesirable_weight:g} do not balance them. "
            f"The KTO paper suggests desirable_weight {low:.3g} to {high:.3g} with undesirable_weight 1, or "
            f"undesirable_weight {other_low:.3g} to {other_high:.3g} with desirable_weight 1."
        )


class KTOTrainer(TetherTrainer):
    """Kahneman-Tversky optimization and similar on single completions; arguments as in TRL 1.16.

    A row of `kto` is a tree of two branches: its own completion, and another row's (see
    `tether.training.algorithms.kto_mismatch`) whose log-ratio estimates the KL divergence. The baseline z0 is
    `max(0, mean)` of these over all rows of the optimizer step, micro-batches and processes included, so that no split
    changes the result. A step of one micro-batch has it from the forward that it does anyway. A step of several, by
    accumulation or by the token budget, scores all of them once more without gradient beforehand: one more forward of
    the policy, a quarter more in all; the reference is run once in any case.

    `bco` holds its baseline as a running mean of all earlier steps' log-ratios, which a checkpoint keeps.

    Args:
        model: the policy; see `DPOTrainer` for all arguments.
        train_dataset: rows with `prompt`, `completion` and `label`; or pairs, each of which is read as two rows.

    Reference:
        Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, arXiv:2402.01306.
    """

    args: KTOConfig  # type: ignore[override]
    algorithm_class = KTO


def _log_ratios_by_token(policy: Scores, reference: Scores | None) -> Tensor:
    """Log-ratio of each completion, summed from those of its tokens."""
    return policy.sum_by_completion(policy.token_logps - (0.0 if reference is None else reference.token_logps))


def _sum_and_count_of_mismatched(logratios: Tensor) -> Tensor:
    """Of the log-ratios `[2B]`, sum and count, float64 `[2]`, of those of second branches."""
    others = logratios[1::2].double()
    return torch.stack([others.sum(), others.new_tensor(float(len(others)))])


def _mean(sum_and_count: Tensor) -> Tensor:
    total, count = sum_and_count
    return total / count
