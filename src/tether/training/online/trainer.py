"""What the trainers of sampled completions have in common: the arguments of GRPO's, RLOO's and online DPO's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from tether.errors import ConfigError
from tether.rollout import RolloutEngine
from tether.training.online.config import OnlineConfig
from tether.training.setup.data import Rows
from tether.training.trainer import TetherTrainer

_TURNS = (
    "the trainer calls nothing itself: tools and turns are a rollout_func that returns env_mask, and docs/rollouts.md "
    "has one"
)
# Arguments that would have no effect, and what there is instead.
_NO_PLACE = {
    **{"tools": _TURNS, "environment_factory": _TURNS},
    "data_collator": "batches are made of what was sampled",
    "compute_metrics": "reward functions judge evaluations too, and log_metric logs figures of your own",
}
_ORDER = "Prompts are drawn in an order that is a function of the seed; shuffle_dataset=False keeps that of the rows"


class OnlineTrainer(TetherTrainer):
    """What trainers of sampled completions have in common; see `GRPOTrainer` for the arguments."""

    never_called: ClassVar[dict[str, str]] = dict.fromkeys(("_get_train_sampler", "_get_eval_sampler"), _ORDER)

    def __init__(
        self,
        model: str | Path | nn.Module,
        reward_funcs: Any = None,
        args: OnlineConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        tools: Any = None,
        rollout_func: Callable[..., Any] | None = None,
        environment_factory: Any = None,
        ref_model: str | Path | nn.Module | None = None,
        engine: RolloutEngine | None = None,
        **others: Any,
    ) -> None:
        for name, value in {"tools": tools, "environment_factory": environment_factory, **others}.items():
            if value is not None and name in _NO_PLACE:
                raise ConfigError(f"{name} was given; {_NO_PLACE[name]}. Leave it out.")
        self.algorithm_parts = {
            "reward_funcs": reward_funcs,
            "reward_processing_classes": reward_processing_classes,
            "rollout_func": rollout_func,
            "engine": engine,
            "trainer": self,
        }
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **others,
        )
