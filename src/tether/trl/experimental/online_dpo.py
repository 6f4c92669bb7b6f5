"""Where TRL keeps its trainer of online DPO: `from tether.trl.experimental.online_dpo import OnlineDPOTrainer`."""

from tether.training import OnlineDPOConfig, OnlineDPOTrainer

__all__ = ["OnlineDPOConfig", "OnlineDPOTrainer"]
