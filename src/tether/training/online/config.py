"""What the configurations of trainers that sample have in common; names and defaults as in TRL 1.16."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import gcd
from pathlib import Path
from typing import Any, ClassVar

from tether.errors import ConfigError
from tether.objectives import Range
from tether.objectives.online.correction import MODES, Correction, Mode
from tether.training.config import PreferenceConfig
from tether.training.declaration import Whole, keywords, option, refused

_BY_FILES = "weights reach the server by files on this machine, or as an adapter"
# TRL's fields that are refused when they are set: what they must stay, and why.
REFUSED: dict[str, tuple[Any, str]] = {
    "vllm_model_impl": ("vllm", "the server is started as vLLM has it; give one that runs otherwise by its address"),
    "vllm_enable_sleep_mode": (
        False,
        "the server keeps its share of the device's memory between rollouts; lower vllm_gpu_memory_utilization",
    ),
    "vllm_group_port": (51216, f"no NCCL group is formed, so that there is no port to choose: {_BY_FILES}"),
    "vllm_importance_sampling_cap": (None, "TRL has renamed it; set vllm_importance_sampling_clip_max"),
    "max_tool_calling_iterations": (None, "multi-turn rollouts come from a `rollout_func` that returns `env_mask`"),
    "use_transformers_paged": (False, "the tree engine drops finished rows already"),
    "use_transformers_continuous_batching": (False, "the tree engine drops finished rows already"),
    "transformers_continuous_batching_config": (None, "the tree engine drops finished rows already"),
    "cache_implementation": (None, "the tree engine has no cache object"),
    "ds3_gather_for_generation": (
        True,
        "processes draw different numbers of tokens, so that each has all weights while it does",
    ),
    "log_multimodal": (True, "completions are shown as text, with no image in any case"),
    "log_completions_hub_repo": (None, "rollouts are kept in the run folder; push that"),
    "auto_find_batch_size": (False, "a rollout holds whole groups; lower per_device_train_batch_size"),
}


# Settings of sampling by the names that transformers or vLLM have for them, and the fields that they are.
GENERATION = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    **{"max_new_tokens": "max_completion_length", "max_tokens": "max_completion_length", "seed": "rollout_seed"},
}
# What describes a server that the run starts.
_OF_OWN_SERVER = {
    *("vllm_python", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
}


@dataclass
class OnlineConfig(PreferenceConfig):
    """Fields that every trainer of sampled completions has.

    Batches are counted in completions, as in TRL: a rollout of `generation_batch_size` completions is used in
    `steps_per_generation` batches of every process, `num_iterations` times over.

    Raises:
        ConfigError: a value that is not allowed, numbers that do not divide each other, or an option that would do
            nothing.
    """

    WITHOUT_EFFECT: ClassVar[dict[str, str]] = {
        **PreferenceConfig.WITHOUT_EFFECT,
        **dict.fromkeys(
            ("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
            "prompts are prepared before a run, and batches are made of what was sampled",
        ),
        "dataloader_drop_last": "prompts that do not fill a rollout are left out of an epoch in any case",
        "dataset_buffer_size": "a stream of prompts is read whole",
        **dict.fromkeys(("prompt_boundary", "turns"), "rows have prompts alone"),
    }
    UNFIT: ClassVar[dict[str, tuple[Any, str]]] = {
        **PreferenceConfig.UNFIT,
        "train_sampling_strategy": ("random", "shuffle_dataset=False keeps the order of the rows. Leave it out"),
    }

    max_length: int | None = option(None, "Stays None, prompts have `max_prompt_length`.", allowed=(None, Whole(1)))
    truncation_mode: str = option("drop", "Stays `drop`, a prompt that is too long is left out and counted.")
    num_generations: int = option(8, "Completions of each prompt.", allowed=(Whole(2),), key="rollout.group")
    num_generations_eval: int | None = option(
        None, "The same in evaluation; unset: as in training.", allowed=(None, Whole(1)), key="rollout.eval_group"
    )
    max_completion_length: int = option(
        512, "The most tokens of a completion.", allowed=(Whole(1),), key="rollout.max_tokens"
    )
    max_prompt_length: int | None = option(
        None,
        "Tokens of a prompt; longer ones are left out and counted. Unset: any.",
        allowed=(None, Whole(2)),
        key="rollout.max_prompt",
    )
    shuffle_dataset: bool = option(True, "Draw prompts in another order in each epoch.", key="rollout.shuffle")
    generation_batch_size: int | None = option(
        None, "Completions of a rollout over all processes; unset: by `steps_per_generation`.", allowed=(None, Whole(1))
    )
    steps_per_generation: int | None = option(
        None,
        "Batches of each process that a rollout gives; unset: those of one optimizer step.",
        allowed=(None, Whole(1)),
        key="rollout.per_rollout",
    )
    num_iterations: int = option(1, "How often a rollout is trained on.", allowed=(Whole(1),), key="rollout.updates")
    temperature: float = option(
        1.0,
        "What logits are divided by, in rollouts and wherever completions are scored.",
        allowed=(Range(0, low_included=False),),
        key="rollout.temperature",
    )
    top_p: float = option(
        1.0,
        "Draw among the fewest most likely tokens that hold this share of the probability.",
        allowed=(Range(0, 1, low_included=False, high_included=True),),
        key="rollout.top_p",
    )
    top_k: int = option(0, "Draw among that many most likely tokens; 0: all.", allowed=(Whole(0),), key="rollout.top_k")
    min_p: float | None = option(
        None,
        "Draw among tokens of at least this share of the most likely one's probability.",
        allowed=(None, Range(0, 1)),
        key="rollout.min_p",
    )
    repetition_penalty: float = option(
        1.0,
        "What logits of tokens that prompt or completion have already are divided by, or multiplied where they are "
        "negative; ratios correct for it (`vllm_importance_sampling_correction`).",
        allowed=(Range(0, low_included=False),),
        key="rollout.repetition_penalty",
    )
    generation_kwargs: dict[str, Any] | str | None = option(
        None,
        "These settings under the names of transformers or vLLM; any other would change what is sampled unseen.",
        key="the keys of `rollout`, by their names",
    )
    rollout_seed: int | None = option(
        None, "Of all draws; unset: `seed`.", allowed=(None, Whole(0)), key="rollout.seed"
    )
    rollout_engine: str = option(
        "auto",
        "What samples: `tree`, each prompt computed once for its group; `transformers`, by `generate`; `auto`: the "
        "tree where it is proved; `vllm`: a server.",
        allowed=("auto", "tree", "transformers", "vllm"),
        key="rollout.engine",
    )
    use_vllm: bool = option(
        False,
        "Sample by a vLLM server: `rollout_engine` is then `vllm`; the name is TRL's.",
        key="the key rollout.engine",
    )
    vllm_mode: str = option(
        "colocate",
        "`server`: one that runs already; `colocate`: one of the run's own, on this machine.",
        allowed=("colocate", "server"),
        key="rollout.vllm_mode",
    )
    vllm_python: str | None = option(
        None,
        "Interpreter of the environment that has vLLM, for a server of the run's own: vLLM needs other versions of "
        "packages than Tether.",
        key="rollout.vllm_python",
    )
    vllm_server_base_url: str | None = option(
        None, "Address of a server that runs already; it stands for `vllm_mode` `server`.", key="rollout.vllm_url"
    )
    vllm_server_host: str = option("0.0.0.0", "The same by host and port.", key="rollout.vllm_host")
    vllm_server_port: int = option(8000, "See `vllm_server_host`.", allowed=(Whole(1),), key="rollout.vllm_port")
    vllm_server_timeout: float = option(
        240.0,
        "Seconds that a request may take, and that a server of the run's own may take to start.",
        allowed=(Range(0, low_included=False),),
        key="rollout.vllm_timeout",
    )
    vllm_concurrency: int = option(
        64, "Requests under way at once.", allowed=(Whole(1),), key="rollout.vllm_concurrency"
    )
    vllm_tolerance: float | None = option(
        None,
        "Nats that a token's log-prob may differ between server and trainer; unset: what the policy's dtype explains.",
        allowed=(None, Range(0, low_included=False)),
        key="rollout.vllm_tolerance",
    )
    vllm_gpu_memory_utilization: float = option(
        0.3,
        "Share of a device's memory for a server of the run's own.",
        allowed=(Range(0, 1, low_included=False),),
        key="rollout.vllm_memory",
    )
    vllm_max_model_length: int | None = option(
        None,
        "Tokens of a prompt and its completion that a server of the run's own has room for; unset: the longest prompt "
        "and `max_completion_length`.",
        allowed=(None, Whole(2)),
        key="rollout.vllm_context",
    )
    vllm_tensor_parallel_size: int = option(
        1, "Devices of a server of the run's own.", allowed=(Whole(1),), key="rollout.vllm_devices"
    )
    vllm_structured_outputs_regex: str | None = option(
        None,
        "Regular expression that the server holds completions to, in the syntax that it reads; ratios correct for it "
        "(`vllm_importance_sampling_correction`).",
        key="rollout.vllm_regex",
    )
    replay_rollouts: str | None = option(
        None, "Folder of an earlier run whose completions are taken in place of new ones.", key="rollout.replay"
    )
    keep_rollouts: bool = option(True, "Keep rollouts in the run folder.", key="rollout.keep_files")
    reward_weights: list[float] | None = option(
        None, "Weight of each reward function in the sum; None: 1 each.", key="rewards"
    )
    reward_timeout: float | None = option(
        None,
        "Seconds that a call of a reward function may take; unset: any.",
        allowed=(None, Range(0, low_included=False)),
        key="rollout.reward_timeout",
    )
    reward_on_error: str = option(
        "raise",
        "`none`: a completion that a reward function fails on has no reward of it, for up to a tenth of a rollout.",
        allowed=("raise", "none"),
        key="rollout.reward_on_error",
    )
    mask_truncated_completions: bool = option(
        False, "Leave completions that were cut off out of the loss.", key="rollout.mask_truncated"
    )
    vllm_importance_sampling_correction: bool = option(
        True,
        "Correct for log-probs of the engine that are not the trainer's, where it reports them and does not compute "
        "with the policy's own weights; the name is TRL's.",
        key="rollout.correction",
    )
    vllm_importance_sampling_mode: str = option(
        "sequence_mask",
        "Weights of tokens or of whole completions; outside the bounds cut to them or 0.",
        allowed=MODES,
        key="rollout.correction_mode",
    )
    vllm_importance_sampling_clip_max: float | None = option(
        3.0, "Upper bound of these weights.", allowed=(None, Range(0)), key="rollout.correction_max"
    )
    vllm_importance_sampling_clip_min: float | None = option(
        None, "Lower bound of these weights.", allowed=(None, Range(0)), key="rollout.correction_min"
    )
    vllm_model_impl: str = refused(*REFUSED["vllm_model_impl"])
    vllm_enable_sleep_mode: bool = refused(*REFUSED["vllm_enable_sleep_mode"])
    vllm_group_port: int = refused(*REFUSED["vllm_group_port"])
    vllm_importance_sampling_cap: float | None = refused(*REFUSED["vllm_importance_sampling_cap"])
    max_tool_calling_iterations: int | None = refused(*REFUSED["max_tool_calling_iterations"])
    use_transformers_paged: bool = refused(*REFUSED["use_transformers_paged"])
    use_transformers_continuous_batching: bool = refused(*REFUSED["use_transformers_continuous_batching"])
    transformers_continuous_batching_config: dict[str, Any] | str | None = refused(
        *REFUSED["transformers_continuous_batching_config"]
    )
    cache_implementation: str | None = refused(*REFUSED["cache_implementation"])
    ds3_gather_for_generation: bool = refused(*REFUSED["ds3_gather_for_generation"])
    cast_lm_head_to_fp32: bool = option(
        False, "Compute the product with the language-model head in float32, whatever the precision."
    )
    log_completions: bool = option(
        False,
        "With each training log, print the last rollout's completions and write them to `completions/` in the run "
        "folder.",
        key="rollout.log_completions",
    )
    log_multimodal: bool = refused(*REFUSED["log_multimodal"])
    num_completions_to_print: int | None = option(
        None,
        "Completions that `log_completions` prints, drawn by the step; unset: all, 0: none.",
        allowed=(None, Whole(0)),
        key="rollout.completions_to_print",
    )
    log_unique_prompts: bool = option(
        False,
        "Print the first completion of each prompt alone; the files have all.",
        key="rollout.unique_prompts",
    )
    log_completions_hub_repo: str | None = refused(*REFUSED["log_completions_hub_repo"])

    def __post_init__(self) -> None:
        for name, (kept, reason) in REFUSED.items():
            if getattr(self, name, kept) != kept:
                raise ConfigError(f"is {getattr(self, name)!r}; it must stay {kept!r}: {reason}.", name)
        self._take_generation_kwargs()
        self.check_objective()
        self._check_server()
        self._check_rows()
        self._check_correction()
        for name, unset in (("num_completions_to_print", None), ("log_unique_prompts", False)):
            if getattr(self, name) != unset and not self.log_completions:
                raise ConfigError(
                    f"is {getattr(self, name)}, and no completions are logged. Set log_completions.", name
                )
        if not self.needs_reference:
            why = "beta is 0, so that nothing compares with a reference"
            self.go_without_reference(why, "reference", "reference_method", "sync_ref_model")
        # Prepared rows know one limit; set twice, as in a copy of the arguments, it is the same.
        self.max_length = self.max_prompt_length
        super().__post_init__()
        self._count_batches()

    def _take_generation_kwargs(self) -> None:
        """Settings of sampling under other names, as the fields that they are."""
        self.generation_kwargs = keywords("generation_kwargs", self.generation_kwargs)
        for name, value in (self.generation_kwargs or {}).items():
            field = GENERATION.get(name)
            if field is None:
                raise ConfigError(
                    f"has {name!r}, which would change what is sampled unseen. It may have {', '.join(GENERATION)}.",
                    "generation_kwargs",
                )
            if getattr(self, field) not in (value, self.__dataclass_fields__[field].default):
                raise ConfigError(
                    f"has {name} {value!r}, and {field} is {getattr(self, field)!r}. Leave one out.",
                    "generation_kwargs",
                )
            setattr(self, field, value)

    def _check_rows(self) -> None:
        if self.max_length not in (None, self.max_prompt_length):
            raise ConfigError(
                f"is {self.max_length}; prompts have max_prompt_length, completions max_completion_length.",
                "max_length",
            )
        if self.truncation_mode != "drop":
            raise ConfigError(f"is {self.truncation_mode!r}; a prompt that is too long is left out.", "truncation_mode")
        if self.stream_dataset:
            raise ConfigError(
                "is True; prompts are drawn from all rows, so that they are read whole.", "stream_dataset"
            )
        if self.wants_store():
            raise ConfigError(
                "was given, and no completion is known before it is sampled. Leave the store out.", self._store_field
            )
        if self.top_k == 1:
            raise ConfigError("is 1, so that all completions of a prompt are the same. Take 2 or more.", "top_k")
        if self.neftune_noise_alpha is not None:
            raise ConfigError(
                f"is {self.neftune_noise_alpha}, and completions are sampled and compared without noise: the KL "
                "divergence would not begin at 0, nor ratios at 1. Leave it out.",
                "neftune_noise_alpha",
            )
        if self.replay_rollouts is not None and self.keep_rollouts:
            own, replayed = (Path(str(one)).expanduser().resolve() for one in (self.output_dir, self.replay_rollouts))
            if own == replayed:
                raise ConfigError(
                    f"is {str(self.replay_rollouts)!r}, the run's own folder, whose rollouts would be replaced while "
                    "they are read. Take another output_dir, or set keep_rollouts to False.",
                    "replay_rollouts",
                )

    def _check_server(self) -> None:
        """A server is wanted and described, or not wanted and not described."""
        if self.use_vllm and self.rollout_engine not in ("auto", "vllm"):
            raise ConfigError(f"is {self.rollout_engine!r}, and use_vllm is True. Leave one out.", "rollout_engine")
        if self.use_vllm:
            self.rollout_engine = "vllm"
        changed = [
            one.name
            for one in fields(self)
            if one.name.startswith("vllm_")
            and not one.name.startswith("vllm_importance")
            and getattr(self, one.name) != one.default
        ]
        if self.rollout_engine != "vllm":
            if changed:
                raise ConfigError(
                    f"is {getattr(self, changed[0])!r}, and no vLLM server samples. Set rollout_engine to 'vllm', or "
                    "leave it out.",
                    changed[0],
                )
            return
        if self.vllm_server_base_url is not None:
            self.vllm_mode = "server"
        if self.vllm_structured_outputs_regex == "":
            raise ConfigError("is empty; expected a regular expression. Leave it out.", "vllm_structured_outputs_regex")
        own = self.vllm_mode == "colocate"
        if own and self.vllm_python is None:
            raise ConfigError(
                "is unset, and the run starts a vLLM server of its own. Name the Python that has vLLM, or give the "
                "address of a server as vllm_server_base_url.",
                "vllm_python",
            )
        idle = {"vllm_server_host", "vllm_server_port"} if own else _OF_OWN_SERVER
        whose = "the run's own" if own else "one that runs already"
        for name in changed:
            if name in idle:
                raise ConfigError(
                    f"is {getattr(self, name)!r}, and the server is {whose}, where it has no effect. Leave it out.",
                    name,
                )

    @property
    def vllm_url(self) -> str | None:
        """Address of a server that runs already; None where the run starts one."""
        if self.vllm_mode == "colocate":
            return None
        host = "127.0.0.1" if self.vllm_server_host == "0.0.0.0" else self.vllm_server_host
        return self.vllm_server_base_url or f"http://{host}:{self.vllm_server_port}"

    def _check_correction(self) -> None:
        for name, unset in (("repetition_penalty", 1), ("vllm_structured_outputs_regex", None)):
            if getattr(self, name) != unset and not self.vllm_importance_sampling_correction:
                raise ConfigError(
                    f"is {getattr(self, name)!r}, and vllm_importance_sampling_correction is False, so that tokens "
                    "would be trained on as if the policy itself had drawn them. Set one of the two back.",
                    name,
                )
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ConfigError(
                f"is {low}; it must be below vllm_importance_sampling_clip_max, which is {high}.",
                "vllm_importance_sampling_clip_min",
            )
        if low is None and high is None and self.vllm_importance_sampling_mode.endswith("truncate"):
            raise ConfigError(
                f"is {self.vllm_importance_sampling_mode!r}, and no bound is set. Set "
                "vllm_importance_sampling_clip_max.",
                "vllm_importance_sampling_mode",
            )

    def correction(self) -> Correction | None:
        """How log-probs of the engine are corrected for; None: not at all."""
        if not self.vllm_importance_sampling_correction:
            return None
        mode: Mode = self.vllm_importance_sampling_mode  # type: ignore[assignment]
        return Correction(mode, self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max)

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL divergence from a reference."""
        return getattr(self, "beta", 0.0) > 0

    @property
    def objective_name(self) -> str:
        """For messages."""
        return f"loss {getattr(self, 'loss_type', 'rloo')} with beta 0"

    def _count_batches(self) -> None:
        """Refuse rollouts, batches and optimizer steps that do not fit together."""
        together = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ConfigError(
                "was given with steps_per_generation; one follows from the other.", "generation_batch_size"
            )
        if self.generation_batch_size is not None and self.generation_batch_size % together:
            raise ConfigError(
                f"is {self.generation_batch_size}; it must be a multiple of the {together} completions that all "
                "processes train on at once.",
                "generation_batch_size",
            )
        steps, accumulated = self.batches_per_rollout, self.gradient_accumulation_steps
        if self.completions_per_rollout % self.num_generations:
            raise ConfigError(
                f"is {self.num_generations}, which does not divide the {self.completions_per_rollout} completions of "
                f"a rollout (per_device_train_batch_size {self.per_device_train_batch_size} x {self.world_size} "
                f"processes x {steps} batches). Set a multiple of it in one of these.",
                "num_generations",
            )
        if gcd(steps, accumulated) != min(steps, accumulated):
            raise ConfigError(
                f"is {steps}, and an optimizer step takes {accumulated} batches (gradient_accumulation_steps); one "
                "must be a multiple of the other.",
                "steps_per_generation",
            )
        if self.num_iterations > 1 and steps < accumulated:
            raise ConfigError(
                f"is {self.num_iterations}, and an optimizer step takes {accumulated // steps} rollouts, so that it "
                "would have the same gradient twice. Set steps_per_generation to gradient_accumulation_steps.",
                "num_iterations",
            )

    @property
    def batches_per_rollout(self) -> int:
        """Batches of each process that a rollout gives, each trained on `num_iterations` times."""
        if self.generation_batch_size is not None:
            return self.generation_batch_size // (self.per_device_train_batch_size * self.world_size)
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def completions_per_rollout(self) -> int:
        """Over all processes."""
        return self.per_device_train_batch_size * self.world_size * self.batches_per_rollout

    @property
    def reuses_rollouts(self) -> bool:
        """Whether a rollout is trained on after the policy has moved from where it was sampled."""
        return self.batches_per_rollout * self.num_iterations > self.gradient_accumulation_steps
