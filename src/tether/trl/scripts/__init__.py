"""What TRL's `scripts` exports."""

from tether.trl.arguments import DatasetMixtureConfig, ScriptArguments, get_dataset
from tether.trl.parser import TrlParser, init_zero_verbose

__all__ = ["DatasetMixtureConfig", "ScriptArguments", "TrlParser", "get_dataset", "init_zero_verbose"]
