"""The trainer that learns from single judged completions."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, cast

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from tether.data import Prepared
from tether.data.prepare.stream import Arrange
from tether.objectives import OBJECTIVES
from tether.objectives.unpaired import is_balanced, suggested_weights, unpaired_loss
from tether.reference.base import frozen_pass
from tether.training.batching import MicroBatch
from tether.training.mismatched import Mismatching, with_mismatched
from tether.training.trainer import TetherTrainer
from tether.training.unpaired_arguments import KTOConfig
from tether.types import LossOutput, Scores, ScoringBatch

logger = logging.getLogger("tether")


class KTOTrainer(TetherTrainer):
    """Kahneman-Tversky optimization and its kin on single completions; arguments as in TRL 1.16.

    A row of `kto` is a tree of two branches: its own completion, and another row's (see `tether.training.mismatched`)
    whose log-ratio estimates the KL divergence. The baseline z0 is `max(0, mean)` of these over all rows of the
    optimizer step, micro-batches and processes included, so that no split changes the result. A step of one
    micro-batch has it from the forward that it does anyway. A step of several, by accumulation or by the token budget,
    scores all of them once more without gradient beforehand: one more forward of the policy, a quarter more in all; the
    reference is run once in any case.

    `bco` holds its baseline as a running mean of all earlier steps' log-ratios, which a checkpoint keeps.

    Args:
        model: the policy; see `DPOTrainer` for all arguments.
        train_dataset: rows with `prompt`, `completion` and `label`; or pairs, each of which is read as two rows.

    Reference:
        Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, arXiv:2402.01306.
    """

    args: KTOConfig  # type: ignore[override]
    config = KTOConfig
    columns = ("label", "weight")
    _balance_said = False

    def restore_objective(self, state: dict[str, float]) -> None:
        """Start, or go on with, BCO's running mean."""
        # On the CPU in float64, as a checkpoint holds it: a resumed run has the same numbers to the last digit.
        self._earlier = torch.tensor([state.get("sum", 0.0), state.get("count", 0.0)], dtype=torch.float64)
        self._current: Tensor | None = None
        self._z0: Tensor | None = None
        self._references: dict[tuple[bytes, ...], Tensor] = {}
        self._evaluated: list[Tensor] = []
        self._mode: str | None = "train"

    def objective_state(self) -> dict[str, float]:
        """BCO's running mean as a sum of log-ratios and a count of rows; empty for other losses."""
        if self.args.loss_type != "bco":
            return {}
        self._close_step()
        return dict(zip(("sum", "count"), self._earlier.tolist(), strict=True))

    def arrange(self, prepared: Prepared, args: KTOConfig) -> Prepared:
        """Say how the classes are balanced, and add the completions of the KL estimate."""
        if prepared.report.name == "train":
            desirable = int(sum(prepared.dataset["label"]))
            _say_balance(desirable, len(prepared.dataset) - desirable, args)
        return with_mismatched(prepared, args.max_length) if args.loss_type == "kto" else prepared

    def arrange_chunks(self, args: KTOConfig) -> Arrange:
        """The same of a stream, whose classes are counted in its first chunk."""
        pairing = Mismatching(args.max_length, "train") if args.loss_type == "kto" else None

        def change(table: pa.Table) -> pa.Table:
            if not self._balance_said:
                self._balance_said = True
                desirable = int(sum(table["label"].to_pylist()))
                _say_balance(desirable, len(table) - desirable, args)
            return table if pairing is None else pairing(table)

        return change

    @property
    def _branches(self) -> int:
        return 2 if self.args.loss_type == "kto" else 1

    def trained_tokens(self, batch: ScoringBatch) -> int:
        """Tokens of each prompt with its own completion."""
        return sum(batch.sequence_lengths[:: self._branches])

    def before_step(self, batches: list[MicroBatch]) -> None:
        """Find the baseline of a step of several micro-batches."""
        self._close_step()
        self._z0, self._references = None, {}
        if self.args.loss_type != "kto":
            return
        parts = [
            replace(part, repeated=part.repeated or batch.repeated)
            for batch in batches
            for part in self._budget.split(batch.batch, self.accelerator)
        ]
        if len(parts) == 1:
            return
        model, found = cast(nn.Module, self.model_wrapped), torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for part in parts:
            batch = part.batch.to(self.args.device)
            reference = self._references[batch.keys] = super().reference_logps(batch)
            with frozen_pass(model):
                policy = self._scorer(model, batch)
            if not part.repeated:
                found += _mismatched(policy.sum_by_completion(policy.token_logps - reference))
        self._z0 = self._mean(found).clamp(min=0)

    def reference_logps(self, batch: ScoringBatch) -> Tensor:
        """Those of `before_step` where it scored them."""
        kept = self._references.get(batch.keys)
        return super().reference_logps(batch) if kept is None else kept

    def _judge_batch(self, model: nn.Module, batch: ScoringBatch, mode: str | None) -> LossOutput:
        self._mode = mode
        if mode == "eval":
            # Of the last step; every process makes as many passes of the reference as the others.
            self._references = {}
        return super()._judge_batch(model, batch, mode)

    def judge(self, policy: Scores, reference: Scores, batch: ScoringBatch) -> LossOutput:
        """The configured loss of single completions."""
        desirable = batch.values["label"] > 0.5
        logratios = (policy.logps - reference.logps).detach()
        baseline = self._baseline(logratios)
        weights = batch.values.get("weight", torch.ones_like(batch.values["label"]))
        if self._mode == "eval":
            self._evaluated.append(torch.stack([logratios[:: self._branches], desirable, weights], dim=1))
        output = unpaired_loss(
            policy,
            reference,
            desirable,
            loss=self.args.loss_type,
            baseline=baseline,
            branches=self._branches,
            **self.args.objective_options(),
        )
        output = replace(output, per_example=output.per_example * weights)
        rows = torch.tensor(float(len(desirable)), device=baseline.device)
        if self.args.loss_type == "bco":
            output.metrics["delta"] = (self.args.beta * baseline * rows, rows)
        elif self.args.loss_type == "kto":
            shown = (baseline * rows, rows) if self._mode != "eval" else tuple(_mismatched(logratios))
            output.metrics["kl"] = cast(tuple[Tensor, Tensor], shown)
        return output

    def _baseline(self, logratios: Tensor) -> Tensor:
        """Of the step, in nats; in evaluation, `kto` knows its own only at the end."""
        if self.args.loss_type == "bco":
            if self._mode == "train":
                new = torch.stack([logratios.double().sum(), logratios.new_tensor(float(len(logratios))).double()])
                self._current = new if self._current is None else self._current + new
            total, count = self._earlier.tolist()
            return logratios.new_tensor(total / count if count else 0.0)
        if self.args.loss_type != "kto" or self._mode == "eval":
            return logratios.new_zeros(())
        if self._z0 is None:
            # A batch that does not count takes part in the sum of the others.
            found = _mismatched(logratios)
            z0 = self._mean(found if self._mode is not None else torch.zeros_like(found)).clamp(min=0)
        else:
            z0 = self._z0
        return z0.to(logratios.dtype)

    def _mean(self, sum_and_count: Tensor) -> Tensor:
        total, count = cast(Tensor, self.accelerator.reduce(sum_and_count, reduction="sum"))
        return total / count

    def _close_step(self) -> None:
        """Add the last step's rows, of all processes, to the running mean."""
        if self._current is not None:
            self._earlier = self._earlier + cast(Tensor, self.accelerator.reduce(self._current, reduction="sum")).cpu()
            self._current = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As for every trainer; what an interrupted evaluation left behind is forgotten."""
        self._close_step()
        self._evaluated = []
        return super().evaluation_loop(*args, **kwargs)

    def completed(self, means: dict[str, float], mode: str) -> dict[str, float]:
        """The margin between the classes; in evaluation, KTO's loss with the baseline of the whole set."""
        if mode == "eval" and self.args.loss_type == "kto":
            means["kl"] = max(0.0, means["kl"])
            rows = torch.cat([torch.zeros(0, 3, device=self.args.device), *self._evaluated]).double()
            losses = rows[:, 2] * OBJECTIVES["kto"]["kto"](
                rows[:, 0], rows[:, 1] > 0.5, means["kl"], **self.args.objective_options()
            )
            loss = self._mean(torch.stack([losses.sum(), losses.new_tensor(float(len(losses)))]))
            means["loss"] = loss.item() + self._router_coefficient * means.get("aux_loss", 0.0)
        self._evaluated = []
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    def convention(self) -> str:
        """What the objective's options mean, in one line."""
        options = ", ".join(f"{name} {value:g}" for name, value in self.args.objective_options().items())
        return f"objective: {self.args.loss_type} ({options}): {OBJECTIVES['kto'][self.args.loss_type].convention}"


def _mismatched(logratios: Tensor) -> Tensor:
    """Sum and count, float64 `[2]`, of the log-ratios of second branches, `[2B]` all."""
    others = logratios[1::2].double()
    return torch.stack([others.sum(), others.new_tensor(float(len(others)))])


def _say_balance(desirable: int, undesirable: int, args: KTOConfig) -> None:
    counts = f"labels: {desirable} desirable and {undesirable} undesirable rows"
    weights = suggested_weights(desirable, undesirable)
    if weights is None or is_balanced(desirable, undesirable, args.desirable_weight, args.undesirable_weight):
        logger.info(counts)
        return
    (low, high), (other_low, other_high) = weights
    logger.warning(
        f"{counts}; their weights {args.desirable_weight:g} and {args.undesirable_weight:g} do not balance them. The "
        f"KTO paper suggests desirable_weight {low:.3g} to {high:.3g} with undesirable_weight 1, or undesirable_weight "
        f"{other_low:.3g} to {other_high:.3g} with desirable_weight 1."
    )
