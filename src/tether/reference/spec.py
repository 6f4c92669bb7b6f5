"""What the user declared: the meaning of the reference, a forced method, and how it moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from tether.errors import Allowed, ConfigError
from tether.types import Meaning, Method

METHODS: dict[Meaning, tuple[Method, ...]] = {
    "start": ("adapter_off", "snapshot", "model", "remote"),
    "base": ("adapter_off", "snapshot", "remote"),
    "model": ("model", "remote"),
    "adapter": ("adapter_on", "snapshot", "model"),
    "none": ("none",),
}
Keep = Literal["device", "host"]
_Text = Annotated[str, Field(min_length=1)]
# The methods whose weights are a copy that may be moved.
_MOVING: dict[Meaning, Method] = {"start": "snapshot", "adapter": "snapshot", "model": "model"}


@dataclass(frozen=True)
class Sync:
    """How a reference moves (TR-DPO): every `steps` it becomes `alpha * policy + (1 - alpha) * reference`.

    Args:
        steps: optimizer steps between two moves, from 1.
        alpha: the policy's share, above 0 and at most 1; 1 replaces the reference (a hard update).

    Raises:
        ConfigError: a value outside its range.

    Reference:
        Gorbatovski et al., Learn Your Reference Model for Real Good Alignment, eq. 4 and 5, arXiv:2404.09656.

    Example:
        >>> str(Sync(512, 0.6))
        'every 512 steps 0.6 of the policy'
    """

    steps: int = 512
    alpha: float = 0.6

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"sync: steps (ref_model_sync_steps) is {self.steps}; it must be at least 1.")
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"sync: alpha (ref_model_mixup_alpha) is {self.alpha}; it must be above 0 and at most 1.")

    def __str__(self) -> str:
        return f"every {self.steps} steps {self.alpha:g} of the policy"

    def due(self, step: int) -> bool:
        """Whether the reference moves after this optimizer step."""
        return step > 0 and step % self.steps == 0


@dataclass(frozen=True)
class RemoteOptions:
    """An OpenAI-compatible completions server that returns prompt log-probabilities, as vLLM does.

    A run file has these fields under `reference.remote`, with type, text and bounds from here.

    Raises:
        ConfigError: a value outside its range.
    """

    url: Annotated[
        str,
        Field(description="Give the server's address, with or without /v1.", pattern="^https?://."),
        Allowed("an address that begins with http:// or https://"),
    ]
    model: Annotated[_Text | None, Field(description="Name it is served under; null: the only one there is.")] = None
    concurrency: Annotated[
        int, Field(description="Requests under way at once.", ge=1), Allowed("a whole number from 1")
    ] = 8
    retries: Annotated[
        int,
        Field(description="Further attempts after a failure that may pass.", ge=0),  # connection, 408, 429, 5xx
        Allowed("a whole number from 0"),
    ] = 5
    timeout: Annotated[float, Field(description="Seconds one request may take.", gt=0), Allowed("seconds, above 0")] = (
        120.0
    )
    tolerance: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(description="Nats a token may differ from a computation here; null: what the dtype explains."),
        Allowed("nats, above 0, or null"),
    ] = None
    api_key_env: Annotated[_Text | None, Field(description="Environment variable with the server's key.")] = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"remote: url is {self.url!r}; it must begin with http:// or https://.")
        if "@" in self.url.split("/")[2]:
            raise ConfigError(
                "remote: url holds a name or a password, which would be written into the run's files. Leave it out, "
                "and name the environment variable that holds the key as `api_key_env`."
            )
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0 or (self.tolerance or 1) <= 0:
            raise ConfigError(
                f"remote: concurrency {self.concurrency}, retries {self.retries}, timeout {self.timeout}, tolerance "
                f"{self.tolerance}; allowed are at least 1, at least 0, above 0, and above 0 or unset."
            )


@dataclass(frozen=True)
class ReferenceSpec:
    """What the user declared.

    Args:
        meaning: `start`, `base`, `model`, `adapter` or `none`.
        method: a forced method, or None to let Tether choose.
        model: the other model, for `model`.
        source: where the policy (or, for `model`, the other model) came from, for the record.
        revision: commit of the source where it has one.
        adapter: for `adapter`, the name of an adapter that is loaded on the policy.
        keep: where a snapshot is kept; None lets free memory decide.
        remote: the server, for the method `remote`.
        sync: how the reference moves; None for not at all.
        spill: folder that takes a large snapshot while a full store does not need it; None keeps it in memory.
        reload: loads the other model again after a full store let it go; None for one that was given in memory.
        base: for `base`, gives the fingerprint of the base as its source has it; None where there is no source.
    """

    meaning: Meaning = "start"
    method: Method | None = None
    model: nn.Module | None = field(default=None, repr=False)
    source: str = "object in memory"
    revision: str | None = None
    adapter: str | None = None
    keep: Keep | None = None
    remote: RemoteOptions | None = None
    sync: Sync | None = None
    spill: Path | None = None
    reload: Callable[[], nn.Module] | None = field(default=None, repr=False, compare=False)
    base: Callable[[], str | None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.meaning not in METHODS:
            raise ConfigError(f"reference: got {self.meaning!r}; allowed are {', '.join(METHODS)}.")
        if self.method is not None and self.method not in METHODS[self.meaning]:
            raise ConfigError(
                f"reference method {self.method!r} cannot compute the meaning {self.meaning!r}; allowed are "
                f"{', '.join(METHODS[self.meaning])}, or leave it unset and Tether chooses."
            )
        if self.keep is not None and self.method not in (None, "snapshot"):
            raise ConfigError(
                f"reference_snapshot is {self.keep!r}, but the method is {self.method}, which keeps no snapshot. Leave "
                "one of them out."
            )
        if (self.remote is not None) != (self.method == "remote"):
            raise ConfigError(
                "The method remote and the server's address belong together: give reference_remote (in a run file "
                "`reference: {remote: {url: ...}}`), and leave reference_method unset or remote."
            )
        self._check_sync()

    def _check_sync(self) -> None:
        if self.sync is None:
            return
        by = _MOVING.get(self.meaning)
        if by is None or self.method not in (None, by):
            raise ConfigError(
                f"sync was asked for with the meaning {self.meaning} and the method {self.method or 'unset'}. What can "
                "move is a snapshot of the policy's start or of the adapter that it trains, or a second model in this "
                "process: set reference to start, or name a model of the policy's architecture, and leave "
                "reference_method unset; or turn sync off."
            )
