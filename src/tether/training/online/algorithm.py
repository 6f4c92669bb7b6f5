"""The algorithm of every trainer whose completions the policy samples itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from tether.compat.accelerate import stage3_settings, uses_fsdp2
from tether.data import text_tokenizer
from tether.errors import ConfigError
from tether.models.structure import transformers_model
from tether.objectives.online.policy_gradient_loss import PolicyGradient, Sampled, policy_gradient_loss
from tether.rewards import (
    OFFERED,
    READY_MADE,
    Calling,
    ModelReward,
    Reward,
    as_rewards,
    check_signatures,
    python_function,
)
from tether.rollout import ReplayEngine, RolloutEngine, Sampling
from tether.rollout.sample import stop_ids
from tether.scoring import score
from tether.training.algorithms.base import Algorithm, Needs, Passes
from tether.training.online.config import OnlineConfig
from tether.training.online.entropy import EntropyBonus, OnlineContext, highest_of
from tether.training.online.experience import GIVEN, Experience, Plan, means_of
from tether.training.online.function import FunctionEngine
from tether.training.online.reward_gain import standard_error
from tether.training.online.serving import Serving
from tether.training.online.table import CompletionsTable
from tether.training.setup.data import RunData
from tether.training.source.base import Source
from tether.training.source.rollouts import RolloutSource, Shape, is_chat, require_even
from tether.training.step import Context, MicroBatch, Step
from tether.types import LossOutput, Scores, ScoringBatch

logger = logging.getLogger("tether")


def as_reward_functions(given: Any, processing: Any = None) -> list[Any]:
    """What a trainer was given, as callables: functions, names of ready-made ones, files, models.

    Args:
        given: one or several.
        processing: tokenizers of reward models, one for each; None: their own.

    Raises:
        ConfigError: a name that is no reward, or tokenizers that do not match.
    """
    functions = list(given) if isinstance(given, (list, tuple)) else [given]
    tokenizers = list(processing) if isinstance(processing, (list, tuple)) else [processing] * len(functions)
    if len(tokenizers) != len(functions):
        raise ConfigError(
            f"reward_processing_classes has {len(tokenizers)} entries for {len(functions)} reward functions; give one "
            "each, None for a function."
        )
    return [_function(one, tokenizer) for one, tokenizer in zip(functions, tokenizers, strict=True)]


def _function(given: Any, tokenizer: Any) -> Any:
    if isinstance(given, nn.Module):
        return ModelReward(given, tokenizer)
    if not isinstance(given, str):
        return given
    if given in READY_MADE:
        try:
            return READY_MADE[given]()
        except TypeError as error:
            raise ConfigError(
                f"The reward {given!r} needs options: call tether.rewards.READY_MADE[{given!r}]."
            ) from error
    return python_function(given) if ":" in given else ModelReward(given, tokenizer)


class Online(Algorithm[Scores]):
    """Groups of sampled completions, judged by rewards; see `GRPOTrainer`.

    Args:
        args: the run's configuration.
        model_config: of the model.
        tokenizer: of the policy; None: it is loaded from the policy's source, as the trainer does.
        reward_funcs: see `as_reward_functions`; None with a `rollout_func` that returns `rewards`.
        reward_processing_classes: tokenizers of reward models.
        rollout_func: samples in place of an engine.
        engine: the same, as a `RolloutEngine`.
        trainer: what `rollout_func` is given.
    """

    args: OnlineConfig
    still_steps = True
    scores_reference = False
    # Of each group the best and the worst completion are a pair.
    pairs: ClassVar[bool] = False

    def __init__(
        self,
        args: Any,
        model_config: Any,
        *,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        rollout_func: Callable[..., Any] | None = None,
        engine: RolloutEngine | None = None,
        trainer: Any = None,
    ) -> None:
        super().__init__(args, model_config)
        if sum(one is not None for one in (rollout_func, engine, args.replay_rollouts)) > 1:
            raise ConfigError(
                "rollout_func, engine and replay_rollouts each say where completions come from; give one."
            )
        if reward_funcs is None and rollout_func is None:
            raise ConfigError("reward_funcs is missing; give a function, or a list of functions.")
        self.rewards: tuple[Reward, ...] = ()
        if reward_funcs is not None:
            self.rewards = as_rewards(as_reward_functions(reward_funcs, reward_processing_classes), args.reward_weights)
        self._own_fields = rollout_func is not None
        self._engine = engine if args.replay_rollouts is None else ReplayEngine(args.replay_rollouts)
        self._tokenizer: Any = None
        self._never: tuple[int, ...] = ()  # tokens that no completion may have
        if rollout_func is not None:
            self._engine = FunctionEngine(rollout_func, trainer, self._ends)
        self._experience: Experience | None = None
        self._evaluating = False  # `complete` comes next, for an evaluation
        self.scoring = partial(score, temperature=args.temperature, wide_head=args.cast_lm_head_to_fp32)

    # -- before a run ------------------------------------------------------------------------------------------------

    @property
    def needs(self) -> Needs:
        """The entropy is reported, and may be a part of the loss."""
        return Needs(policy=("entropy" if self.bonus is None else "entropy_gradient",))

    @cached_property
    def bonus(self) -> EntropyBonus | None:
        """The entropy in the loss; None: it is none of it."""
        return None

    @property
    def top_entropy(self) -> float:
        """Share of a step's tokens, those of the highest entropy, that have a policy gradient."""
        return 1.0

    @cached_property
    def objective(self) -> PolicyGradient:
        """Surrogate, KL, correction, reduction."""
        raise NotImplementedError

    def advantages(self, rewards: Tensor, weights: Tensor, kl: Tensor | None, group: int) -> Tensor:
        """Advantages of completions; see `tether.training.online.experience.Advantages`."""
        raise NotImplementedError

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL divergence is a part of the reward, and not of the loss."""
        return False

    @property
    def leaves_without_variance(self) -> bool:
        """Whether groups whose rewards are all equal are left out."""
        return False

    @property
    def resample_rounds(self) -> int:
        """How often groups whose rewards are all equal are replaced by other prompts."""
        return 0

    @property
    def name(self) -> str:
        """The loss."""
        return self.objective.row.name

    def check_rows(self, batch: ScoringBatch) -> None:
        """Numbers of rows go to reward functions, so that none is ignored."""

    def source(self, source: Source, data: RunData) -> Source:
        """Prompts whose completions are sampled on the way; reward functions are checked against their columns.

        Raises:
            ConfigError: a reward function names a column that the rows lack; or prompts have images, and an engine is
                asked for that does not read them.
        """
        args, raw = self.args, data.rows_of(source.rows)
        for name, (_, rows) in zip(data.reports, data.sets, strict=True):
            check_signatures(self.rewards, rows.column_names, further=self._own_fields, name=name)
        most = self._require_room([rows for rows, _ in data.sets])
        for name, (rows, _) in zip(data.reports, data.sets, strict=True):
            if rows is not source.rows:
                require_even(name, len(rows), args.world_size)
        if "images" in source.rows.column_names:
            self._read_images(data.tokenizer)
        self._processing: Any = data.tokenizer
        self._tokenizer = text_tokenizer(self._processing)
        self._chat = any(is_chat(rows) for _, rows in data.sets)
        self._experience = Experience(self._plan(), self._decode, self._engine)
        self._say_columns(raw.column_names)
        shape = Shape(
            group=args.num_generations,
            batch=args.per_device_train_batch_size,
            batches=args.batches_per_rollout,
            iterations=args.num_iterations,
            processes=args.world_size,
            process=args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.shuffle_dataset,
            eval_group=args.num_generations_eval or args.num_generations,
            eval_batch=args.per_device_eval_batch_size,
        )
        shown: list[TrainerCallback] = []
        if args.log_completions:
            folder = Path(str(args.output_dir))
            shows = args.num_completions_to_print, args.log_unique_prompts
            shown.append(CompletionsTable(lambda: self.made.last, folder, *shows))
        return RolloutSource(
            source.rows, raw, shape, self._experience.make, data.rows_of, self._identity(), shown, most
        )

    def _say_columns(self, columns: Sequence[str]) -> None:
        """Which columns reward functions may name, and which they cannot have."""
        hidden = [name for name in columns if name in OFFERED]
        others = [name for name in columns if name not in ("prompt", "tools", "chat_template_kwargs", *hidden)]
        if others:
            logger.info(
                f"rewards: {', '.join(one.name for one in self.rewards)}; columns for them: {', '.join(others)}"
            )
        if hidden:
            logger.warning(
                f"rewards: by {', '.join(hidden)} functions are given what was sampled, and not the rows' columns of "
                "that name. Rename a column that they need."
            )

    def _read_images(self, processor: Any) -> None:
        """Sample by `generate`, and never a token that stands for a part of an image."""
        if self.args.rollout_engine in ("tree", "vllm"):
            why = {"tree": "does not read images", "vllm": "is given token ids alone, which hold no image"}
            raise ConfigError(
                f"is {self.args.rollout_engine!r}, and the prompts have images: it {why[self.args.rollout_engine]}. "
                "Leave it out, or set it to 'transformers'.",
                "rollout_engine",
            )
        self._never = (int(processor.image_token_id),)
        if self._engine is None:
            logger.info("rollouts: the prompts have images, so that completions are sampled by transformers' generate")

    @property
    def made(self) -> Experience:
        """What samples and judges."""
        assert self._experience is not None, "source() comes first"
        return self._experience

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have as it was, for its completions and rewards to be those of the whole run."""
        names = (
            "zero_variance",
            "resample_rounds",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "vllm_structured_outputs_regex",
            "max_completion_length",
            "num_generations",
            "num_iterations",
        )
        rewards = [[one.name, one.weight] for one in self.rewards]
        seed = self.args.seed if self.args.rollout_seed is None else self.args.rollout_seed
        known = {name: getattr(self.args, name) for name in names if hasattr(self.args, name)}
        return known | {"rewards": rewards, "rollout_seed": seed}

    def _require_room(self, sets: Sequence[Dataset]) -> int:
        """Refuse prompts, of an evaluation too, after which the model has no place for a whole completion, before any
        weights load; how long a completion may be."""
        context = getattr(self.model_config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(ids) for rows in sets for ids in rows["prompt_ids"])
        most = self.args.max_completion_length
        self._longest = longest
        if isinstance(context, int) and not self.model_config.is_encoder_decoder and longest + most > context:
            fits = f"max_prompt_length to {context - most} or less, or " if context - most > 1 else ""
            raise ConfigError(
                f"The longest prompt has {longest} tokens and max_completion_length is {most}: more than the "
                f"{context} that the model has places for. Set {fits}max_completion_length to "
                f"{max(1, context - longest)} or less."
            )
        return most

    def _plan(self) -> Plan:
        args = self.args
        sampling = Sampling(
            args.temperature,
            args.max_completion_length,
            (),
            args.top_k,
            args.top_p,
            args.min_p or 0.0,
            args.seed if args.rollout_seed is None else args.rollout_seed,
            args.repetition_penalty,
            args.vllm_structured_outputs_regex,
            self._never,
        )
        return Plan(
            sampling,
            "transformers" if self._never else args.rollout_engine,
            self.rewards,
            Calling(args.reward_timeout, cast(Any, args.reward_on_error)),
            self.advantages,
            proximal=args.reuses_rollouts,
            correct=args.vllm_importance_sampling_correction,
            reference=args.needs_reference,
            kl_in_reward=self.kl_in_reward and args.needs_reference,
            leave_truncated=args.mask_truncated_completions,
            leave_without_variance=self.leaves_without_variance,
            folder=Path(str(args.output_dir)) if args.keep_rollouts else None,
            table=args.log_completions,
            pairs=self.pairs,
            resample_rounds=self.resample_rounds,
            apart=getattr(args, "multi_objective_aggregation", "") == "normalize_then_sum",
            wide_head=args.cast_lm_head_to_fp32,
            serving=self._serving() if args.rollout_engine == "vllm" else None,
        )

    def _serving(self) -> Serving:
        args = self.args
        return Serving(
            args.vllm_url,
            args.vllm_python,
            args.vllm_server_timeout,
            args.vllm_concurrency,
            args.vllm_tolerance,
            args.vllm_gpu_memory_utilization,
            args.vllm_tensor_parallel_size,
            # The proof has eight tokens after a prompt, and one more is asked for.
            args.vllm_max_model_length or self._longest + max(args.max_completion_length, 16),
            Path(str(args.output_dir)) / "vllm.log",
            self._tokenizer.save_pretrained,
        )

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _stops(self) -> tuple[int, ...]:
        """Every token that ends a completion."""
        return stop_ids(self._generation, self._processing, chat=self._chat)

    def _ends(self) -> tuple[int, ...]:
        """After what a completion of a `rollout_func` counts as ended, where that does not say it: as in TRL."""
        padding = self._tokenizer.pad_token_id
        return self._stops() if padding is None else (*self._stops(), padding)

    def attach(self, passes: Passes) -> None:
        """Sample by the run's policy.

        Raises:
            ConfigError: its weights will be in shards that cannot be gathered for what samples.
        """
        assert self._experience is not None
        _check_shards(passes.accelerator, self.args.rollout_engine)
        self._generation = transformers_model(passes.model()).generation_config
        plan = self._experience.plan
        self._experience.plan = replace(plan, sampling=replace(plan.sampling, stop_ids=self._stops()))
        self._experience.passes = passes
        for one in self.rewards:
            if isinstance(one.function, ModelReward):
                one.function.to(passes.accelerator.device)

    # -- steps -------------------------------------------------------------------------------------------------------

    def loss_tokens(self, batch: ScoringBatch) -> int:
        """Tokens that are trained on."""
        return int(batch.completion_values["weight"][batch.completion_index].sum())

    def begin_step(self, step: Step, passes: Passes) -> Context:
        """What the reference said when the rollout began, and figures of rollouts that began since the last step."""
        references = {part: _reference(part.batch) for part in step.parts} if self.args.needs_reference else {}
        assert self._experience is not None
        found, self._experience.pending = self._experience.pending, []
        share = self.top_entropy
        high = highest_of(step, passes, share) if share < 1 else None
        return OnlineContext(references, means_of(found, self.args.device), high)

    def end_step(self, context: Context, passes: Passes) -> None:
        """The coefficient of the entropy may change."""
        if self.bonus is not None:
            self.bonus.step(passes)

    def reference(self, part: MicroBatch, context: Context, score: Callable[[], Scores | None]) -> Scores | None:
        """What it said when the completions were made, in evaluation too."""
        known = _reference(part.batch)
        return super().reference(part, context, score) if known is None else known

    def complete(self, means: dict[str, float]) -> dict[str, float]:
        """With how far the reward has come, in the logs of training."""
        evaluating, self._evaluating = self._evaluating, False
        if evaluating or not means:
            return means
        coefficient = {} if self.bonus is None else {"entropy_coef": self.bonus.coefficient}
        # The later updates of a rollout have no rewards of their own.
        return {**means, **coefficient, **(self.made.progress.since() if "reward" in means else {})}

    def state(self) -> dict[str, float]:
        """The first reward, and the coefficient of the entropy where it changes."""
        return {**self.made.progress.state(), **({} if self.bonus is None else self.bonus.state())}

    def load_state(self, state: dict[str, float]) -> None:
        """See `state`."""
        self.made.progress.load(state)
        if self.bonus is not None:
            self.bonus.load(state)

    def begin_evaluation(self, passes: Passes) -> Context:
        """Figures of an evaluation are its own."""
        assert self._experience is not None
        self._experience.evaluated, self._experience.evaluated_groups = [], []
        return Context()

    def end_evaluation(self, context: Context, means: dict[str, float]) -> dict[str, float]:
        """With the figures of its rollouts."""
        assert self._experience is not None
        self._evaluating = True
        found = means_of(self._experience.evaluated, "cpu")
        if not found:  # a look at what an evaluation gives, before there is one
            return {**means, **dict.fromkeys(self._experience.figures, 0.0)}
        error = standard_error(torch.cat(self._experience.evaluated_groups))
        means = {**means, **{name: (total / count).item() for name, (total, count) in found.items()}}
        return means if error is None else {**means, "reward_error": error}

    def loss(self, policy: Scores, reference: Scores | None, part: MicroBatch, context: Context) -> LossOutput:
        """The surrogate of the completions of a micro-batch."""
        batch = part.batch
        sampled = Sampled(
            batch.completion_values["advantage"],
            batch.completion_values["weight"],
            batch.token_values.get("proximal"),
            batch.token_values.get("rollout"),
            batch.token_values.get("reference"),
        )
        trains, bonus = isinstance(context, OnlineContext), self.bonus
        high = context.high if isinstance(context, OnlineContext) else None
        coefficient = None if bonus is None else bonus.now
        output = policy_gradient_loss(policy, sampled, self.objective, high=high, bonus=coefficient)
        if bonus is not None and trains and part.counts:
            bonus.saw(*output.metrics.get("entropy/high", output.metrics["entropy"]))
        return output

    def describe(self) -> str:
        """What the objective's options mean."""
        objective, args = self.objective, self.args
        options = ", ".join(f"{name} {value:g}" for name, value in objective.options.items() if value is not None)
        beta = getattr(args, "beta", 0.0)
        place = "as a part of the reward (k1)" if self.kl_in_reward else f"in the loss ({objective.kl})"
        kl = f"KL {place}, beta {beta:g}" if beta else "no KL, beta 0"
        names = ", ".join(one.name for one in self.rewards) or GIVEN
        said = f"{objective.row.name} ({options or 'no options'}): {objective.row.convention}"
        return f"objective: {said}; {kl}; rewards: {names}"


def _check_shards(accelerator: Accelerator, engine: str) -> None:
    by_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if by_fsdp and not uses_fsdp2(accelerator):
        raise ConfigError(
            "The policy would be in shards of FSDP's first version, which nothing gathers for sampling. Set "
            "`version: 2` in `fsdp_config`, or `fsdp_version: 2` in accelerate's configuration."
        )
    by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if engine == "vllm" and by_deepspeed and stage3_settings(accelerator) is not None:
        raise ConfigError(
            "A vLLM server is sent whole weights, which was tried with shards of FSDP2 and not with those of ZeRO-3 "
            "yet. Sample with the engine auto, or train by FSDP2 or ZeRO-2."
        )


def _reference(batch: ScoringBatch) -> Scores | None:
    found = batch.token_values.get("reference")
    return None if found is None else Scores(found, batch.completion_index, batch.num_completions)
