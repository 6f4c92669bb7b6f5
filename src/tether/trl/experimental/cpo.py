"""Where TRL keeps its trainer of CPO: `from tether.trl.experimental.cpo import CPOTrainer`."""

from tether.training import CPOConfig, CPOTrainer

__all__ = ["CPOConfig", "CPOTrainer"]
