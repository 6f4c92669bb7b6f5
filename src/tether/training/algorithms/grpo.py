"""Group relative policy optimization, and its variants DAPO, Dr. GRPO, GSPO, CISPO, SAPO, LUSPO, VESPO, REINFORCE."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any, cast

from torch import Tensor

from tether.errors import ConfigError
from tether.objectives import OBJECTIVES, Range
from tether.objectives.online.advantages import group_advantages, normalize_then_sum, weighted_sum
from tether.objectives.online.policy_gradient_loss import PolicyGradient
from tether.training.declaration import REGISTERED, Whole, losses_of, option
from tether.training.online.algorithm import Online
from tether.training.online.config import OnlineConfig
from tether.training.online.entropy import EntropyBonus
from tether.training.online.trainer import OnlineTrainer

# What is of a coefficient that changes.
_ADAPTIVE = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
_SCALES: tuple[Any, ...] = ("group", "batch", "none", True, False)


@dataclass
class GRPOConfig(OnlineConfig, algorithm="grpo"):
    """Configuration of `GRPOTrainer`; names and defaults as in TRL 1.16.

    Raises:
        ConfigError: an unknown loss, an option outside its range or without effect, or options that have no meaning
            together.
    """

    loss_type: str = option(
        "dapo",
        f"{losses_of('grpo')}.",
        key="objective.loss",
    )
    beta: float = REGISTERED
    epsilon: float = REGISTERED
    epsilon_high: float | None = REGISTERED
    delta: float | None = REGISTERED
    sapo_temperature_pos: float = REGISTERED
    sapo_temperature_neg: float = REGISTERED
    vespo_k_pos: float = REGISTERED
    vespo_lambda_pos: float = REGISTERED
    vespo_k_neg: float = REGISTERED
    vespo_lambda_neg: float = REGISTERED
    importance_sampling_level: str | None = option(
        None,
        "Ratios of each `token`, or one of each completion (`sequence`); unset: as the loss has it.",
        allowed=(None, "token", "sequence"),
    )
    # Not `str | bool`, though True and False stand for `group` and `none`: HfArgumentParser would take no text.
    scale_rewards: str = option(
        "group",
        "What centred rewards are divided by: the deviation of their `group`, of the whole `batch`, or nothing "
        "(`none`).",
    )
    multi_objective_aggregation: str = option(
        "sum_then_normalize",
        "Several rewards are summed first, or each normalised in its group first (`normalize_then_sum`).",
        allowed=("sum_then_normalize", "normalize_then_sum"),
    )
    zero_variance: str = option(
        "keep",
        "Groups whose rewards are all equal; `skip`: they are not computed, the same gradient at beta 0; `resample`: "
        "other prompts take their place (DAPO's dynamic sampling).",
        allowed=("keep", "skip", "resample"),
    )
    resample_rounds: int = option(
        3,
        "How often `resample` looks for other prompts; groups that are equal still are kept as they are.",
        allowed=(Whole(1),),
    )
    kl_estimator: str = option("k3", "Estimate of the KL divergence in the loss, `k2` or `k3`.", allowed=("k2", "k3"))
    kl_place: str = option(
        "loss", "The KL divergence is in the `loss`, or a part of the `reward` (by k1).", allowed=("loss", "reward")
    )
    use_bias_correction_kl: bool = option(
        True, "Multiply the estimate by the ratio, so that its gradient is right off policy."
    )
    off_policy_mask_threshold: float | None = option(
        None,
        "Leave out completions with a negative advantage from which the policy has moved more than this per token.",
        allowed=(None, Range(0, low_included=False)),
    )
    top_entropy_quantile: float = option(
        1.0,
        "Share of a step's tokens, those of the highest entropy, that have a policy gradient; one more pass finds "
        "them.",
        allowed=(Range(0, 1, low_included=False, high_included=True),),
    )
    entropy_coef: float = option(
        0.0,
        "What the mean entropy of a token is multiplied by and subtracted from the loss; with `use_adaptive_entropy` "
        "at the start.",
        allowed=(Range(-inf),),
    )
    use_adaptive_entropy: bool = option(
        False,
        "Change `entropy_coef` after each step: up by `entropy_coef_delta` where the entropy is at or below "
        "`entropy_target`, else down; it counts only after a step at or below the target.",
    )
    entropy_coef_min: float = option(0.0, "The least that it becomes.", allowed=(Range(-inf),))
    entropy_coef_max: float = option(1.0, "The most that it becomes.", allowed=(Range(-inf),))
    entropy_coef_delta: float = option(0.005, "How much it changes in a step.", allowed=(Range(0, low_included=False),))
    entropy_target: float = option(
        0.2, "Mean entropy of a token that is wanted, in nats.", allowed=(Range(0, low_included=False),)
    )

    def __post_init__(self) -> None:
        if self.scale_rewards not in _SCALES:
            raise ConfigError(f"is {self.scale_rewards!r}; allowed are group, batch, none.", "scale_rewards")
        self.scale_rewards = {True: "group", False: "none"}.get(cast(Any, self.scale_rewards), self.scale_rewards)
        if self.resample_rounds != 3 and self.zero_variance != "resample":
            raise ConfigError(
                f"is {self.resample_rounds}, and zero_variance is {self.zero_variance!r}, so that nothing is sampled "
                "again. Leave it out.",
                "resample_rounds",
            )
        super().__post_init__()
        row = self.objective_rows[0]
        if row.name == "cispo" and self.epsilon_high is None:
            raise ConfigError(
                "is unset, and cispo takes it as the largest weight itself: TRL's default of 0.2 would cut every "
                "weight to a fifth. Set it, for instance to 5.",
                "epsilon_high",
            )
        if row.name == "reinforce" and self.reuses_rollouts:
            raise ConfigError(
                "is 'reinforce', which knows no ratio, and a rollout is trained on after the policy has moved. Take a "
                "loss with ratios, or one step for each rollout.",
                "loss_type",
            )
        if self.zero_variance == "skip" and self.beta:
            raise ConfigError(
                "is 'skip' and beta is above 0: groups without variance are still held to the reference. Keep them, or "
                "set beta to 0.",
                "zero_variance",
            )
        if self.multi_objective_aggregation == "normalize_then_sum" and self.scale_rewards != "group":
            raise ConfigError(
                f"is {self.scale_rewards!r}, and normalize_then_sum scales by itself. Leave it out.", "scale_rewards"
            )
        self._check_entropy()

    def _check_entropy(self) -> None:
        moved = [name for name in _ADAPTIVE if getattr(self, name) != self.__dataclass_fields__[name].default]
        if moved and not self.use_adaptive_entropy:
            raise ConfigError(
                f"is {getattr(self, moved[0])}, and use_adaptive_entropy is False, so that the coefficient stays. Set "
                "it, or leave this out.",
                moved[0],
            )
        if self.use_adaptive_entropy and not self.entropy_coef_min <= self.entropy_coef <= self.entropy_coef_max:
            raise ConfigError(
                f"is {self.entropy_coef}; it begins between entropy_coef_min ({self.entropy_coef_min}) and "
                f"entropy_coef_max ({self.entropy_coef_max}).",
                "entropy_coef",
            )


class GRPO(Online):
    """The losses of groups in the registry; see `GRPOTrainer`."""

    config = GRPOConfig
    args: GRPOConfig  # type: ignore[assignment]

    @cached_property
    def objective(self) -> PolicyGradient:
        """Surrogate, KL, correction, reduction."""
        args = self.args
        return PolicyGradient(
            OBJECTIVES["grpo"][args.loss_type],
            {name: value for name, value in args.objective_options().items() if name != "beta"},
            level=cast(Any, args.importance_sampling_level),
            beta=0.0 if self.kl_in_reward else args.beta,
            kl=args.kl_estimator,
            kl_ratio=args.use_bias_correction_kl,
            correction=args.correction(),
            off_policy_threshold=args.off_policy_mask_threshold,
            top_entropy=args.top_entropy_quantile,
            longest=args.max_completion_length,
        )

    @property
    def top_entropy(self) -> float:
        """As `top_entropy_quantile` says."""
        return self.args.top_entropy_quantile

    @cached_property
    def bonus(self) -> EntropyBonus | None:
        """As `entropy_coef` and what belongs to it say."""
        args = self.args
        if not args.use_adaptive_entropy:
            return EntropyBonus(args.entropy_coef) if args.entropy_coef else None
        bounds = args.entropy_coef_delta, args.entropy_coef_min, args.entropy_coef_max
        return EntropyBonus(args.entropy_coef, args.entropy_target, *bounds)

    @property
    def kl_in_reward(self) -> bool:
        """As `kl_place` says."""
        return self.args.kl_place == "reward"

    @property
    def leaves_without_variance(self) -> bool:
        """As `zero_variance` says."""
        return self.args.zero_variance == "skip"

    @property
    def resample_rounds(self) -> int:
        """As `zero_variance` says."""
        return self.args.resample_rounds if self.args.zero_variance == "resample" else 0

    def advantages(self, rewards: Tensor, weights: Tensor, kl: Tensor | None, group: int) -> Tensor:
        """Rewards against the mean of their group."""
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            return normalize_then_sum(rewards, weights, group)[0]
        total = weighted_sum(rewards, weights)
        total = total if kl is None else total - self.args.beta * kl
        return group_advantages(total, group, cast(Any, self.args.scale_rewards))


class GRPOTrainer(OnlineTrainer):
    """Group relative policy optimization; arguments as in TRL 1.16.

    Args:
        model: the policy; see `DPOTrainer`.
        reward_funcs: what judges completions: a function, or several, each called as
            `f(prompts=, completions=, completion_ids=, column=, ...)` with what it names, and returning a number, or
            None, for each completion; the name of a ready-made one (`tether.rewards.READY_MADE`); `file.py:function`;
            or a model that classifies sequences. None: `rollout_func` returns `rewards`.
        args: `GRPOConfig`.
        train_dataset: rows with `prompt`, and columns for reward functions.
        eval_dataset: the same, or a dictionary of several sets.
        processing_class: the tokenizer; left out, it is loaded from the model's source.
        reward_processing_classes: tokenizers of reward models, one for each of `reward_funcs`; None: their own.
        callbacks: further transformers callbacks.
        optimizers: an optimizer and a scheduler in place of those that `args` describe.
        quantization_config: of transformers, for a model that is named.
        peft_config: a PEFT configuration; adds a new adapter to the model.
        tools: refused; so is `environment_factory`.
        rollout_func: samples in place of an engine, see `tether.training.online.function`.
        ref_model: another model as the reference, with `beta` above 0; left out, it is what `args.reference` says.
        engine: a `tether.rollout.RolloutEngine`.

    Raises:
        ConfigError, DataError: before any weights are loaded, where that is possible.
        ReferencePolicyError: the reference is wrong, or nothing would train.
        RolloutError: no engine samples from what is trained.
        RewardError: a reward function failed; the message names it and the row.

    Reference:
        Shao et al., DeepSeekMath, arXiv:2402.03300.
    """

    args: GRPOConfig  # type: ignore[override]
    algorithm_class = GRPO
