"""Training: configurations shaped like TRL's and trainers over `transformers.Trainer`."""

from tether.training.config import PreferenceConfig
from tether.training.dpo_arguments import DPOConfig
from tether.training.preference import DPOTrainer
from tether.training.reference_free import CPOTrainer, ORPOTrainer
from tether.training.reference_free_arguments import CPOConfig, ORPOConfig
from tether.training.reward import RewardTrainer
from tether.training.reward_arguments import RewardConfig
from tether.training.supervised import SFTTrainer
from tether.training.supervised_arguments import SFTConfig
from tether.training.trainer import TetherTrainer
from tether.training.unpaired import KTOTrainer
from tether.training.unpaired_arguments import KTOConfig

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "PreferenceConfig",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "TetherTrainer",
]
