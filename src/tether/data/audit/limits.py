"""Limits on what the audit finds: shares of rows above which a check fails and a run is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from tether.data.audit.audit import FINDINGS, Check, check
from tether.data.audit.language import EXTRA, detector
from tether.errors import ConfigError


def check_limits(limits: Mapping[str, float]) -> None:
    """Refuse limits that say nothing.

    Raises:
        ConfigError: a name is no finding, or a limit is no share.
    """
    for name, limit in limits.items():
        if name not in FINDINGS:
            raise ConfigError(f"check: `{name}` is not known. Known are {', '.join(FINDINGS)}.")
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 <= limit <= 1:
            raise ConfigError(f"check.{name} is {limit!r}; it must be a share from 0 to 1.")
    if "other_language" in limits and detector() is None:
        raise ConfigError(f"check.other_language is given, and no library tells languages: {EXTRA}; or leave it out.")


def check_sets(train: Dataset, evaluation: Mapping[str, Dataset], **options: Any) -> list[Check]:
    """The audit of the training rows, beside the evaluation sets, and of each of these; see `check` for the options."""
    first = check(train, evaluation=list(evaluation.values()), name="train", **options)
    return [first, *(check(rows, name=name, **options) for name, rows in evaluation.items())]


def passed(found: Sequence[Check], limits: Mapping[str, float]) -> list[str]:
    """Findings whose share is above its limit, in words.

    Raises:
        ConfigError: see `check_limits`.
    """
    check_limits(limits)
    return [
        f"{one.name}: {finding.share:.2%} of the rows {FINDINGS[name]} ({name}); the limit is {limits[name]:.2%}"
        for one in found
        for name, finding in one.findings.items()
        if name in limits and finding.share > limits[name]
    ]
