"""Where TRL keeps its trainer of KTO: `from tether.trl.experimental.kto import KTOTrainer`."""

from tether.training import KTOConfig, KTOTrainer

__all__ = ["KTOConfig", "KTOTrainer"]
