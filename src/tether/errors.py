"""Every error Tether raises on purpose: what was given, what is allowed, what to do.

The command line prints these as one paragraph. `exit_code` is 2 for bad input and 1 for a failed run.
"""

from dataclasses import dataclass
from traceback import extract_tb


@dataclass(frozen=True)
class Allowed:
    """What a field or a key may be, in words for a message: part of its type, as in `Annotated[int, Allowed("1")]`."""

    words: str


class TetherError(Exception):
    """Base of all errors that Tether raises on purpose."""

    exit_code = 1


class ConfigError(TetherError):
    """An option, a run file or an argument that cannot be honoured.

    Args:
        words: what is wrong; where a field is named, they follow its name.
        field: of the trainer's configuration. A caller that calls it otherwise, as a run file does, puts its own name
            before `words`.
    """

    exit_code = 2

    def __init__(self, words: str, field: str | None = None) -> None:
        super().__init__(words if field is None else f"{field} {words}")
        self.words, self.field = words, field


class DataError(TetherError):
    """Rows that cannot be used as given."""

    exit_code = 2


class ReferencePolicyError(TetherError):
    """The reference policy is not, or is no longer, what was declared."""


class ScoringError(TetherError):
    """A batch that cannot be scored exactly by the model at hand."""


class StoreError(TetherError):
    """The store of reference log-probabilities cannot be read, written or trusted."""


class RolloutError(TetherError):
    """Completions that could not be sampled, or that are not the policy's."""


class RewardError(TetherError):
    """A reward function that failed, or returned what is no reward."""


def line_in(function: object, error: BaseException) -> str:
    """Where in a function's own file an error came from, to follow its message; empty where it did not pass there."""
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [one.lineno for one in extract_tb(error.__traceback__) if one.filename == file]
    return f" (line {lines[-1]} of {file})" if lines else ""
