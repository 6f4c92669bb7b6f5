"""What a command lets through to the terminal: Tether's lines and warnings that matter, not the libraries' noise."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from tether.compat.launcher import is_first, require_numbers
from tether.compat.messages import NO_PINNED_MEMORY, SPECIAL_TOKENS, TOO_LONG
from tether.progress import console
from tether.redact import masked

# Messages of libraries that are right in general and mean nothing here, each with its reason.
_NOISE = (SPECIAL_TOKENS, TOO_LONG, NO_PINNED_MEMORY)


class _Lines(logging.Handler):
    """Prints records to the console of the progress display, so that the two do not write over each other."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if any(message.startswith(noise) for noise in _NOISE):
            return
        own = record.name.split(".")[0] == "tether"
        style = "" if record.levelno < logging.WARNING else "yellow"
        text = message if own else f"{record.name.split('.')[0]}: {message}"
        console().print(masked(text), style=style, markup=False, soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    # Without the file and line of a library, which --debug shows.
    console().print(masked(f"{category.__name__}: {message}"), style="yellow", markup=False, soft_wrap=True)


@contextlib.contextmanager
def terminal_output(debug: bool) -> Iterator[None]:
    """Send what matters to the console while a command runs, and leave logging as it was.

    Args:
        debug: let everything through, libraries' information included.

    Raises:
        ConfigError: what a launcher sets in the environment is not a number; libraries fail over it, each in its way.
    """
    require_numbers()
    import datasets

    from tether.compat.transformers import without_bars

    handler = _Lines(logging.DEBUG if debug else logging.INFO)
    own, theirs = logging.getLogger("tether"), logging.getLogger("transformers")
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in (own, theirs)]
    for logger, level in ((own, logging.INFO), (theirs, logging.INFO if debug else logging.WARNING)):
        logger.setLevel(level)
        logger.propagate = False
        logger.handlers = [handler]
    # Launched by torchrun or accelerate, the first process speaks for all.
    if not is_first():
        own.setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        with without_bars(), warnings.catch_warnings():
            if not debug:
                # Deprecations speak to whoever calls a library; users of a command cannot act on them.
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                for noise in _NOISE:
                    warnings.filterwarnings("ignore", message=noise)
                warnings.showwarning = _show_warning
            yield
    finally:
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers
        datasets.enable_progress_bars()
