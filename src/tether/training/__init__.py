"""Training: configurations shaped like TRL's and trainers over `transformers.Trainer`."""

from tether.training.algorithms.cpo import CPO, CPOTrainer
from tether.training.algorithms.dpo import DPO, DPOTrainer
from tether.training.algorithms.kto import KTO, KTOTrainer
from tether.training.algorithms.orpo import ORPO, ORPOTrainer
from tether.training.algorithms.reward import Reward, RewardTrainer
from tether.training.algorithms.sft import SFT, SFTTrainer
from tether.training.config import PreferenceConfig
from tether.training.dpo_arguments import DPOConfig
from tether.training.reference_free_arguments import CPOConfig, ORPOConfig
from tether.training.reward_arguments import RewardConfig
from tether.training.supervised_arguments import SFTConfig
from tether.training.trainer import TetherTrainer
from tether.training.unpaired_arguments import KTOConfig

__all__ = [
    "CPO",
    "DPO",
    "KTO",
    "ORPO",
    "SFT",
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "PreferenceConfig",
    "Reward",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "TetherTrainer",
]
