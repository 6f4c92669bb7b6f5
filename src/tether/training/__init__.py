"""Training: configurations shaped like TRL's and trainers over `transformers.Trainer`."""

from tether.training.arguments import PreferenceConfig
from tether.training.dpo_arguments import DPOConfig
from tether.training.preference import DPOTrainer
from tether.training.trainer import TetherTrainer

__all__ = ["DPOConfig", "DPOTrainer", "PreferenceConfig", "TetherTrainer"]
