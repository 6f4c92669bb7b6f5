"""Files of TRL, Axolotl and LLaMA-Factory: told apart, turned into a run file, with what became of every key."""

from tether.config.foreign.convert import (
    TOOLS,
    Conversion,
    convert_document,
    convert_file,
    detect,
    from_flags,
    is_foreign,
)
from tether.config.foreign.rules.trl import COMMANDS

__all__ = ["COMMANDS", "TOOLS", "Conversion", "convert_document", "convert_file", "detect", "from_flags", "is_foreign"]
