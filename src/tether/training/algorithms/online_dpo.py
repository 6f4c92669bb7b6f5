"""Online DPO: the best and the worst of each group of sampled completions are a pair, for any loss of pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from tether.errors import ConfigError
from tether.objectives import Combination
from tether.objectives.preference_loss import preference_loss
from tether.training.algorithms.base import Needs
from tether.training.declaration import option
from tether.training.online.algorithm import Online
from tether.training.online.config import OnlineConfig
from tether.training.online.trainer import OnlineTrainer
from tether.training.step import Context, MicroBatch
from tether.types import Kind, LossOutput, LossTerm, Scores, ScoringBatch


@dataclass
class OnlineDPOConfig(OnlineConfig, algorithm="dpo"):
    """Configuration of `OnlineDPOTrainer`: rollouts as for GRPO, losses and their options as for DPO.

    Raises:
        ConfigError: a loss that is not of pairs alone, an option outside its range or without effect, or batches that
            hold parts of groups.
    """

    preset: ClassVar[str | None] = "online_dpo"
    loss_type: list[str] | str = option(
        ["sigmoid"], "One or several losses of pairs, as in `DPOConfig`.", key="objective.pairs"
    )
    loss_weights: list[float] | None = option(
        None, "One for each of several losses, above 0; None: 1 each.", key="objective.weights"
    )
    num_generations: int = 2

    def __post_init__(self) -> None:
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        combination = self.combination()
        if problem := combination.problem():
            raise ConfigError(problem.words, problem.field)
        unfit = [
            row.name
            for row in combination.rows
            if row.kind != "pair" or row.requires_margins or row.averaged == "micro_batch"
        ]
        if unfit or combination.takes_divergence:
            raise ConfigError(
                f"is {', '.join(unfit or self.loss_type)}, which takes more than a pair of sampled completions: lists, "
                "margins, a whole micro-batch, or the reference's whole distribution. Take another loss, such as "
                "sigmoid, ipo or hinge.",
                "loss_type",
            )
        moved = [
            one.name
            for one in fields(OnlineConfig)
            if one.name.startswith("vllm_importance_sampling") and getattr(self, one.name) != one.default
        ]
        if moved:
            raise ConfigError(
                "was given, and no loss of pairs has ratios that it would correct. Leave it out.", moved[0]
            )
        super().__post_init__()
        if self.per_device_train_batch_size % self.num_generations:
            raise ConfigError(
                f"is {self.per_device_train_batch_size}; it must be a multiple of num_generations, which is "
                f"{self.num_generations}, so that each batch holds whole groups to take pairs from.",
                "per_device_train_batch_size",
            )

    @property
    def kind(self) -> Kind:
        """Prompts: completions are sampled."""
        return "prompt_only"

    @property
    def needs_reference(self) -> bool:
        """As the losses do."""
        return self.combination().needs_reference

    @property
    def objective_name(self) -> str:
        """The losses, for messages."""
        return f"loss {', '.join(self.loss_type)}"

    def combination(self) -> Combination:
        """The objective: losses, weights and options."""
        losses = Combination((self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type))
        options = {} if losses.problem() else self.given_options()
        return Combination(losses.losses, tuple(self.loss_weights or ()), options)


class OnlineDPO(Online):
    """Pairs of sampled completions; see `OnlineDPOTrainer`."""

    config = OnlineDPOConfig
    args: OnlineDPOConfig  # type: ignore[assignment]
    pairs = True

    @cached_property
    def objective(self) -> Combination:  # type: ignore[override]
        """Losses, weights and options."""
        return self.args.combination()

    @property
    def needs(self) -> Needs:
        """What the losses take."""
        return Needs(columns=("weight",), policy=(*Needs.policy, *self.objective.outputs))

    @property
    def name(self) -> str:
        """The losses."""
        return ", ".join(self.objective.losses)

    def advantages(self, rewards: Tensor, weights: Tensor, kl: Tensor | None, group: int) -> Tensor:
        """Zeros: a pair is compared, and no completion of it is weighed."""
        return torch.zeros(len(rewards))

    def loss_tokens(self, batch: ScoringBatch) -> int:
        """Tokens of chosen completions, where a loss is averaged over them."""
        if not any(row.averaged == "tokens" for row in self.objective.rows):
            return 0
        index = batch.completion_index
        return int(((index % 2 == 0) & (_weights(batch)[index // 2] > 0)).sum())

    def reference(self, part: MicroBatch, context: Context, score: Callable[[], Scores | None]) -> Scores | None:
        """What it said when the completions were made; None where the losses compare with none."""
        return super().reference(part, context, score) if self.objective.needs_reference else None

    def loss(self, policy: Scores, reference: Scores | None, part: MicroBatch, context: Context) -> LossOutput:
        """The losses of the pairs that differ in reward; the others count in the step's mean, as zeros."""
        real = _weights(part.batch) > 0
        if not real.any():
            return LossOutput((LossTerm(policy.token_logps.sum()[None] * 0.0),), {})
        found = _of(policy, real)
        return preference_loss(found, None if reference is None else _of(reference, real), loss=self.objective)

    def describe(self) -> str:
        """What the objective's options mean."""
        names = ", ".join(one.name for one in self.rewards) or "rewards"
        return f"{self.objective.convention()}; pairs: the best and the worst of {self.args.num_generations} by {names}"


def _weights(batch: ScoringBatch) -> Tensor:
    """`[B]`, 0 for pairs that are none; the probe of a start has no weights, and its pairs are all real."""
    found = batch.values.get("weight")
    return torch.ones(batch.num_examples, device=batch.input_ids.device) if found is None else found


def _of(scores: Scores, pairs: Tensor) -> Scores:
    """The scores of some pairs."""
    if bool(pairs.all()):
        return scores
    kept = pairs.repeat_interleave(2)
    tokens = kept[scores.completion_index]
    numbers = kept.cumsum(0) - 1
    by_token: dict[str, Any] = {
        one.name: value[tokens]
        for one in fields(scores)
        if isinstance(value := getattr(scores, one.name), Tensor) and len(value.shape) and len(value) == len(tokens)
    }
    by_token["completion_index"] = numbers[scores.completion_index[tokens]]
    return replace(scores, **by_token, num_completions=int(kept.sum()))


class OnlineDPOTrainer(OnlineTrainer):
    """Direct preference optimization on completions that the policy samples; see `GRPOTrainer` for the arguments.

    `reward_funcs` may hold a judge's wins (`tether.rewards.win_rate`): then the pair is what the judge prefers.

    Reference:
        Guo et al., Direct Language Model Alignment from Online AI Feedback, arXiv:2402.04792.
    """

    args: OnlineDPOConfig  # type: ignore[override]
    algorithm_class = OnlineDPO
