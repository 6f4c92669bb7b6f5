"""Reward models: the Bradley-Terry loss of pairs, by a head on each completion's last token."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, set_seed

from tether.data import text_tokenizer
from tether.data.show import Counted
from tether.errors import ConfigError
from tether.models.reward import HEAD, load_reward_model
from tether.models.structure import transformers_model
from tether.objectives.reward_loss import reward_loss
from tether.scoring.reward import REWARDS, require_reward_head, reward
from tether.training.algorithms.base import Algorithm, Needs
from tether.training.config import ReferenceFreeConfig
from tether.training.declaration import REGISTERED
from tether.training.setup.policy import policy_spec
from tether.training.step import Context, MicroBatch
from tether.training.surface.accepted_options import AcceptedTemplateArguments
from tether.training.trainer import ReferenceFreeTrainer
from tether.types import LossOutput, Scores, ScoringBatch

logger = logging.getLogger("tether")


def _rewards(model: nn.Module, batch: ScoringBatch, *, outputs: tuple[str, ...] = (), **options: Any) -> Tensor:
    """`reward` as a scoring function; it has no further outputs."""
    return reward(model, batch, **options)


@dataclass
class RewardConfig(AcceptedTemplateArguments, ReferenceFreeConfig, algorithm="reward"):
    """Configuration of `RewardTrainer`; names and defaults as in TRL 1.16.

    Pairs of which one completion is longer than `max_length` are dropped, since the end of a text decides its reward.

    Raises:
        ConfigError: an option outside its range.
    """

    learning_rate: float = 1e-4
    truncation_mode: str = "drop"
    center_rewards_coefficient: float | None = REGISTERED

    def __post_init__(self) -> None:
        self.check_objective()
        if self.router_aux_loss_coef is not None:
            raise ConfigError(
                f"is {self.router_aux_loss_coef!r}, and reward models do not take it, as in TRL. Leave it out.",
                "router_aux_loss_coef",
            )
        if self.truncation_mode != "drop":
            raise ConfigError(
                f"is {self.truncation_mode!r}, but longer pairs are dropped here, not cut, since the end of a text "
                "decides its reward. Leave it out.",
                "truncation_mode",
            )
        if self.turns != "all":
            raise ConfigError(
                f"is {self.turns!r}, but a reward is of the whole text, read at its end. Leave it out.", "turns"
            )
        super().__post_init__()


class Reward(Algorithm[Tensor]):
    """See `RewardTrainer`."""

    config = RewardConfig
    args: RewardConfig
    scoring = staticmethod(_rewards)
    measures = REWARDS

    @property
    def needs(self) -> Needs:
        """Pairs with margins and weights; of the policy only rewards."""
        return Needs(columns=("margin", "weight"), policy=())

    @property
    def counted(self) -> Counted:
        """The last token, where the reward is read."""
        return "ends"

    def check_model(self, model: str | Path | nn.Module) -> None:
        """A reward is read at the end of prompt and completion as one text, by a head that the architecture has."""
        kind = type(self.model_config).__name__
        if self.model_config.is_encoder_decoder:
            raise ConfigError(
                f"{kind} is of a model with an encoder and a decoder; a reward is read at the last token of prompt and "
                "completion as one text, which only a decoder model reads. Train the reward model from one of these."
            )
        known = type(self.model_config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if isinstance(model, nn.Module):
            require_reward_head(transformers_model(model))
        elif not known and not hasattr(self.model_config, "auto_map"):
            raise ConfigError(
                f"{model}: transformers has no sequence classifier for {kind}, so a reward model of it could not be "
                "loaded again. Take an architecture that has one (for images Gemma 3, say), or pass a model in memory "
                "that has a head `score` with one output."
            )

    def completion_values(self, policy: Tensor, reference: Scores | None) -> dict[str, Tensor]:
        """The rewards."""
        return {"rewards": policy}

    def load_model(self, source: str) -> nn.Module:
        """Load the model; the same seed gives the same new head."""
        set_seed(self.args.seed)
        return load_reward_model(source, **policy_spec(source, self.args).options())

    def load_saved(self, source: str, **options: Any) -> nn.Module:
        """Load a reward model that was saved, or the base of its adapter, whose head comes with that."""
        return load_reward_model(source, **options)

    def adapter(self, peft_config: PeftConfig | None) -> PeftConfig | None:
        """The same adapter for a sequence classifier, whose head is trained in full."""
        if peft_config is None:
            return None
        changed: Any = deepcopy(peft_config)
        saved = list(getattr(changed, "modules_to_save", None) or [])
        if changed.task_type != TaskType.SEQ_CLS or HEAD not in saved:
            logger.info(f"adapter: for sequence classification; the head {HEAD!r} is trained in full beside it")
        changed.task_type, changed.modules_to_save = TaskType.SEQ_CLS, [*saved, *({HEAD} - set(saved))]
        return changed

    def prepare_model(self, model: nn.Module, tokenizer: Any) -> None:
        """In a batch of several rows transformers finds the last token by the padding token."""
        transformers_model(model).config.get_text_config().pad_token_id = text_tokenizer(tokenizer).pad_token_id

    def loss(self, policy: Tensor, reference: Scores | None, part: MicroBatch, context: Context) -> LossOutput:
        """Bradley-Terry on the rewards of each pair."""
        return reward_loss(
            policy,
            margins=part.batch.values.get("margin"),
            weights=part.batch.values.get("weight"),
            center_rewards_coefficient=self.args.center_rewards_coefficient or 0.0,
        )

    def describe(self) -> str:
        """What is compared."""
        center = self.args.center_rewards_coefficient
        return "objective: Bradley-Terry on the rewards at the last token" + (
            f", centred with {center:g}" if center else ""
        )


class RewardTrainer(ReferenceFreeTrainer):
    """A Bradley-Terry reward model, trained on pairs in the same packed trees as every policy; as in TRL 1.16.

    The reward of a completion is what the head `score` makes of the hidden state of its last token, and each prompt is
    computed once. Before the first step the rewards of real rows are compared with those of each sequence alone.

    Args:
        model: a name, a folder or a .gguf file of a causal language model, which gets a new head; or a sequence
            classifier with one output. See `DPOTrainer` for all arguments; there is no reference.
        train_dataset: pairs; a column `margin` says by how much the chosen reward should be larger.
        peft_config: a PEFT configuration; the head is trained in full beside the adapter.

    Reference:
        Ouyang et al., Training language models to follow instructions with human feedback, arXiv:2203.02155.
    """

    args: RewardConfig  # type: ignore[override]
    algorithm_class = Reward
