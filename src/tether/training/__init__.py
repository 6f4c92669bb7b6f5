"""Training: configurations shaped like TRL's and trainers over `transformers.Trainer`."""

from tether.training.algorithms.cpo import CPO, CPOConfig, CPOTrainer
from tether.training.algorithms.dpo import DPO, DPOConfig, DPOTrainer
from tether.training.algorithms.grpo import GRPO, GRPOConfig, GRPOTrainer
from tether.training.algorithms.kto import KTO, KTOConfig, KTOTrainer
from tether.training.algorithms.online_dpo import OnlineDPO, OnlineDPOConfig, OnlineDPOTrainer
from tether.training.algorithms.orpo import ORPO, ORPOConfig, ORPOTrainer
from tether.training.algorithms.reward import Reward, RewardConfig, RewardTrainer
from tether.training.algorithms.rloo import RLOO, RLOOConfig, RLOOTrainer
from tether.training.algorithms.sft import SFT, SFTConfig, SFTTrainer
from tether.training.config import PreferenceConfig
from tether.training.online.config import OnlineConfig
from tether.training.trainer import TetherTrainer

__all__ = [
    "CPO",
    "DPO",
    "GRPO",
    "KTO",
    "ORPO",
    "RLOO",
    "SFT",
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "OnlineConfig",
    "OnlineDPO",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PreferenceConfig",
    "RLOOConfig",
    "RLOOTrainer",
    "Reward",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "TetherTrainer",
]
