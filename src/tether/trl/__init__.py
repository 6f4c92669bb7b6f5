"""What a script for TRL imports besides trainers and configurations: `from tether.trl import ModelConfig`."""

from tether.trl.arguments import (
    DatasetConfig,
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from tether.trl.callbacks import LogCompletionsCallback
from tether.trl.parser import TrlParser

__all__ = [
    "DatasetConfig",
    "DatasetMixtureConfig",
    "LogCompletionsCallback",
    "ModelConfig",
    "ScriptArguments",
    "TrlParser",
    "get_dataset",
    "get_peft_config",
    "get_quantization_config",
]
