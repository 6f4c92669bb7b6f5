"""TRL's argument parser: flags, with defaults from a YAML file that `--config` names."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from tether.errors import ConfigError

logger = logging.getLogger("tether")


def init_zero_verbose() -> None:
    """Show errors alone of what is logged from now on."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR)


class TrlParser(HfArgumentParser):
    """Parses flags into dataclasses; what a file of `--config` says stands where no flag does."""

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """Parse, and put what the file has under `env` into the environment.

        Args:
            args: the flags; None: those of the process.
            return_remaining_strings: give back, last, what no dataclass has; otherwise that is an error.
            fail_with_unknown_args: False: what a file has and no dataclass is said, and left out.
            separate_remaining_strings: give back what the file and what the flags have beyond that as two lists.

        Raises:
            ConfigError: the file is no mapping, or names what no dataclass has.
        """
        given, remaining = list(sys.argv[1:] if args is None else args), []
        if "--config" in given:
            place = given.index("--config")
            path = Path(given[place + 1])
            del given[place : place + 2]
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ConfigError(f"{path} holds no mapping of options to values.")
            os.environ.update({name: str(value) for name, value in (values.pop("env", None) or {}).items()})
            known = {name for kind in self.dataclass_types for name in kind.__dataclass_fields__}  # type: ignore
            remaining = [text for name in values.keys() - known for text in (f"--{name}", str(values[name]))]
            self.set_defaults(**{name: value for name, value in values.items() if name in known})
            needed = [name for name in sorted(known & values.keys()) if self._is_required(name, given)]
            given += [text for name in needed for text in (f"--{name}", str(values[name]))]
        if remaining and not return_remaining_strings:
            said = f"The file of --config has options that nothing takes: {' '.join(remaining[::2])}."
            if fail_with_unknown_args:
                raise ConfigError(said)
            logger.warning(said)
        found = self.parse_args_into_dataclasses(given, return_remaining_strings=return_remaining_strings)
        if not return_remaining_strings:
            return found
        if separate_remaining_strings:
            return (*found[:-1], remaining, found[-1])
        return (*found[:-1], [*remaining, *found[-1]])

    def _is_required(self, name: str, given: list[str]) -> bool:
        kinds: Any = self.dataclass_types
        fields = [kind.__dataclass_fields__[name] for kind in kinds if name in kind.__dataclass_fields__]
        missing = type(fields[0].default).__name__ == "_MISSING_TYPE"
        made = type(fields[0].default_factory).__name__ == "_MISSING_TYPE"
        return missing and made and f"--{name}" not in given
