"""Where TRL keeps the arguments of its scripts."""

from tether.trl.arguments import DatasetConfig, DatasetMixtureConfig, ScriptArguments, get_dataset
from tether.trl.parser import TrlParser, init_zero_verbose

__all__ = ["DatasetConfig", "DatasetMixtureConfig", "ScriptArguments", "TrlParser", "get_dataset", "init_zero_verbose"]
