"""Where TRL keeps its trainer of ORPO: `from tether.trl.experimental.orpo import ORPOTrainer`."""

from tether.training import ORPOConfig, ORPOTrainer

__all__ = ["ORPOConfig", "ORPOTrainer"]
