"""The guards: the policy starts at its reference, the reference stays where it was, and something trains."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tether.compat.accelerate import plain_optimizer
from tether.compat.deepspeed import parameter_groups
from tether.errors import ReferencePolicyError
from tether.models.fingerprint import model_fingerprint
from tether.models.structure import adapter_configs, trainable_tensors, unwrap
from tether.reference.base import Reference, Scorer, frozen_pass, log_probs
from tether.reference.methods.adapter_check import acting_layer
from tether.reference.methods.shards import sums
from tether.types import ScoringBatch

logger = logging.getLogger("tether")


@dataclass(frozen=True)
class GuardResult:
    """Outcome of the start-equality check: largest difference of a token's log-probability, in nats."""

    rows: int
    tokens: int
    max_difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the policy starts at its reference."""
        return self.max_difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "passed": self.passed}


def compare_with_start(
    policy: nn.Module, reference: Reference, scorer: Scorer, batch: ScoringBatch, tolerance: float
) -> GuardResult:
    """Score the probe with the policy, in evaluation mode, and with the reference."""
    with frozen_pass(policy):
        mine = scorer(policy, batch).token_logps
    difference = largest_difference(mine, log_probs(reference, batch))
    return GuardResult(batch.num_examples, len(mine), difference, tolerance)


def largest_difference(first: Tensor, second: Tensor) -> float:
    """Largest difference of two tensors; infinite where one is NaN, which compares as neither larger nor smaller."""
    difference = (first - second).abs().max().item()
    return float("inf") if difference != difference else difference


def require_start_equality(result: GuardResult, reference: Reference, cause: str = "") -> None:
    """Refuse to train when the policy does not start at a `start` reference.

    Args:
        result: of the comparison.
        reference: what the policy was compared with.
        cause: why they differ, and what to do, see `why_not_at_start`.

    Raises:
        ReferencePolicyError: with the difference and the cause.
    """
    if result.passed:
        return
    raise ReferencePolicyError(
        f"The policy is not at its reference before the first update: on {result.rows} rows a token's log-probability "
        f"differs by {result.max_difference:.3g} nats (allowed {result.tolerance:.0e}). The reference means the "
        f"policy at the start, computed by {reference.identity.method}. Cause: {cause or 'unknown'}."
    )


def why_not_at_start(policy: nn.Module, reference: Reference, updates: int) -> str:
    """Why a policy is no longer at its `start` reference, found by comparing it with what was recorded then.

    Args:
        policy: as it is now.
        reference: resolved when the trainer was made.
        updates: that the trainer has made since then.
    """
    identity = reference.identity
    if updates:
        return (
            f"this trainer has trained already, {updates} updates, and its reference is the policy before them. Make "
            "a new trainer from the policy as it is now, or go on with train(resume_from_checkpoint=...)"
        )
    try:
        whole, under = (model_fingerprint(unwrap(policy), without_adapters=without) for without in (False, True))
    except ReferencePolicyError:
        return "the policy's weights changed after the trainer was made, or are not as they were when they are sharded"
    if identity.fingerprint == under and adapter_configs(policy):
        acting = acting_layer(policy)
        if acting:
            return (
                f"{acting}, and it was nothing when the trainer was made; the weights under it are as they were. Make "
                "the trainer after the last change of the adapter"
            )
    if identity.fingerprint not in (whole, under):
        return (
            f"the policy's weights changed after the trainer was made (their fingerprint was {identity.fingerprint} "
            f"and is {under if identity.method == 'adapter_off' else whole}). Make the trainer after the last change"
        )
    if identity.method == "remote":
        return "the server's model is not the policy's start. Serve the weights that this run starts from"
    return (
        "the weights are as they were when the trainer was made, so it is the computation that changed: a hook, a "
        "buffer, an attention implementation or the device. Leave it as it was, or make the trainer later"
    )


class FrozenProbe:
    """A few rows whose reference log-probs are kept and must never change.

    Args:
        reference: what is watched.
        batch: the rows.
        allowed: nats that one token may move, for kernels that do not repeat to the bit.
    """

    def __init__(self, reference: Reference, batch: ScoringBatch, allowed: float) -> None:
        self._reference, self._batch, self._allowed = reference, batch, allowed
        self._values = log_probs(reference, batch)

    @classmethod
    def of(cls, reference: Reference, batch: ScoringBatch) -> FrozenProbe | None:
        """A probe of what computes a reference, from now on; None without a reference."""
        live = reference.live
        return None if live.identity.meaning == "none" else cls(live, batch, live.tolerance)

    def follow(self, step: int, *, rescore: bool = True) -> None:
        """Move the reference if its `sync` is due after this step, and take its new values for those to keep to."""
        reference = self._reference
        if reference.sync is not None and reference.sync.due(step):
            reference.move(reference.sync.alpha)
            if rescore:
                self._values = log_probs(reference, self._batch)

    def check(self, step: int) -> float:
        """Score the rows again.

        Returns:
            Largest movement of a token's log-probability since the start, in nats.

        Raises:
            ReferencePolicyError: the reference moved.
        """
        # Weights that a full store let go cannot move, and come back only with the same fingerprint.
        if not self._reference.resident:
            return 0.0
        moved = (log_probs(self._reference, self._batch) - self._values).abs().max().item()
        if not moved <= self._allowed:
            when = f"at step {step}" if step else "before the first step"
            raise ReferencePolicyError(
                f"The reference moved: {when} a token of the probe has a log-probability {moved:.3g} nats away "
                f"from its value at the start (allowed {self._allowed:.0e}). A frozen tensor changed: were parameters "
                "unfrozen, merged or edited after the trainer was made? The run stops because what it learns from here "
                "is tethered to nothing."
            )
        return moved


class TrainingProof:
    """Proof that something trains: trainable tensors exist, the optimizer holds them, and a step changes one.

    Attributes:
        updates: steps so far that could change something, of all calls of `train`.
    """

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._before: dict[str, Tensor] | None = None
        self._names: set[str] | None = None
        self.updates = 0
        require_trainable(policy)

    def require_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that holds none of the trainable tensors; remember their values.

        Raises:
            ReferencePolicyError: nothing that the optimizer steps requires a gradient.
        """
        optimizer = plain_optimizer(optimizer)
        groups = [*(group["params"] for group in optimizer.param_groups), *parameter_groups(optimizer)]
        held = {id(parameter) for group in groups for parameter in group}
        tensors = trainable_tensors(self._policy)
        if not any(id(parameter) in held for parameter in tensors.values()):
            raise ReferencePolicyError(
                f"The optimizer holds none of the {len(tensors)} trainable tensors, so no step would change the "
                "policy. Make the optimizer from the model that is passed to the trainer, after adapters are added."
            )
        left = [name for name, parameter in tensors.items() if id(parameter) not in held]
        if left:
            logger.warning(
                f"optimizer: it holds {len(tensors) - len(left)} of the {len(tensors)} tensors that want a gradient; "
                f"the others, such as {left[0]!r}, stay as they are. Freeze them (`freeze_parameters`), or give "
                "the optimizer all that is to train"
            )
        self._before, self._names = self._sums(), set(tensors)

    def require_scheduler(self, scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a schedule that would set, and report, the learning rates of another optimizer.

        Raises:
            ReferencePolicyError: the two share no group of parameters.
        """
        theirs = getattr(getattr(scheduler, "scheduler", scheduler), "optimizer", None)
        groups = getattr(theirs, "param_groups", None)
        if groups is None:
            return
        ours = {id(group) for group in plain_optimizer(optimizer).param_groups}
        if not any(id(group) in ours for group in groups):
            raise ReferencePolicyError(
                f"The learning-rate schedule ({type(scheduler).__name__}) was made for another optimizer than the one "
                "that trains, so that its rates would be logged and never used. Give both, "
                "`optimizers=(optimizer, scheduler)`, or leave the schedule to `lr_scheduler_type`."
            )

    def require_same_tensors(self, step: int) -> None:
        """After a step: what trains is what trained when the run began.

        What was proved of the reference, and what is saved, is so for these tensors.

        Raises:
            ReferencePolicyError: with the first tensor that was frozen or unfrozen since.
        """
        now = trainable_tensors(self._policy).keys()
        if self._names is None or now == self._names:
            return
        changed = sorted(self._names - now) or sorted(now - self._names)
        word = "no longer train" if changed[0] in self._names else "train that were frozen"
        raise ReferencePolicyError(
            f"What trains was changed during the run: after step {step} {len(changed)} tensors {word}, such as "
            f"{changed[0]!r}. A callback or a hook froze or unfroze them, or switched adapters and left them so. The "
            "reference and what is saved hold for the tensors that trained at the start: say there what trains "
            "(`train_parameters`, `freeze_parameters`), train in stages with a new trainer for each, and switch "
            "adapters back in the callback that switched them."
        )

    def require_change(self, step: int) -> None:
        """After a step with a learning rate above zero: at least one trainable tensor must have changed.

        Raises:
            ReferencePolicyError: none did.
        """
        before, self._before = self._before, None
        if before is None:
            return
        after = self._sums()
        if all(torch.equal(after[name], value) for name, value in before.items()):
            raise ReferencePolicyError(
                f"No trainable tensor changed in step {step} ({len(after)} tensors). Either no gradient reaches them, "
                "or each update is smaller than the weights' dtype can hold: train in float32, raise the learning "
                "rate, or check that the trainable layers are used in the forward."
            )

    @property
    def pending(self) -> bool:
        """Whether values were remembered and not yet compared."""
        return self._before is not None

    def _sums(self) -> dict[str, Tensor]:
        # Two sums per tensor, since a copy of every tensor would be a second model.
        return sums(trainable_tensors(self._policy))


def require_trainable(policy: nn.Module) -> None:
    """Refuse a model in which nothing would train.

    Raises:
        ReferencePolicyError: no parameter requires a gradient.
    """
    if not trainable_tensors(policy):
        raise ReferencePolicyError(
            f"Nothing would train: none of the {sum(1 for _ in policy.parameters())} parameters of "
            f"{type(policy).__name__} requires a gradient. An adapter loaded for inference needs "
            "is_trainable=True; a merged or frozen model needs requires_grad_(True), or a new adapter (`peft_config`, "
            "in a run file `lora:`)."
        )
    if any(parameter.is_inference() for parameter in trainable_tensors(policy).values()):
        raise ReferencePolicyError(
            "The policy was made inside torch.inference_mode(), so that autograd cannot record what is done with its "
            "weights. Load it outside; torch.no_grad() would do where no gradient is wanted."
        )


def require_recording(step: int) -> None:
    """Refuse to begin a step in which no gradient would be recorded.

    Raises:
        ReferencePolicyError: gradients are switched off.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ReferencePolicyError(
            f"Gradients are switched off in step {step}: train() was called inside torch.no_grad() or "
            "torch.inference_mode(), or a callback called torch.set_grad_enabled(False). Call it outside; in a "
            "callback use `with torch.no_grad():`."
        )
