"""Every error Tether raises on purpose: what came, what was allowed, what to do.

The command line prints these as one paragraph. `exit_code` is 2 for bad input and 1 for a failed run.
"""


class TetherError(Exception):
    """Base of all errors that Tether raises on purpose."""

    exit_code = 1


class ConfigError(TetherError):
    """An option, a run file or an argument that cannot be honoured."""

    exit_code = 2


class DataError(TetherError):
    """Rows that cannot be used as given."""

    exit_code = 2


class ReferencePolicyError(TetherError):
    """The reference policy is not, or is no longer, what was declared."""


class ScoringError(TetherError):
    """A batch that cannot be scored exactly by the model at hand."""


class StoreError(TetherError):
    """The store of reference log-probabilities cannot be read, written or trusted."""
