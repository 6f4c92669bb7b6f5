"""The part of a training configuration that declares the reference; TRL's names where TRL has one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tether.errors import ConfigError
from tether.reference import ReferenceSpec, RemoteOptions, Sync
from tether.reference.spec import Keep
from tether.types import Meaning, Means

_MEANS = (None, "adapter_off", "adapter_on", "snapshot", "model", "remote")


@dataclass
class ReferenceArguments:
    """What the reference means and, where it is forced, how it is computed.

    Args:
        reference: what the reference means: `start`, `base`, `model`, `adapter` or `none`; unset: `start`, or `model`
            or `adapter` where one is given.
        reference_adapter: an adapter as the reference: the name of one that is loaded on the policy, or a folder.
        reference_means: force how it is computed: `adapter_off`, `adapter_on`, `snapshot`, `model` or `remote`; unset:
            chosen and printed.
        reference_snapshot: where a snapshot is kept, `device` or `host`; unset: by free memory.
        reference_remote: a server as the means: `url`, and further fields of `tether.reference.RemoteOptions`.
        reference_check_steps: steps between two checks that the reference has not moved; 0: never.
        ref_model_init_kwargs: keywords for loading a `ref_model` that is named by a string, such as `revision`,
            `dtype`, `device_map`, `attn_implementation`, or `quantization` (`4bit` or `8bit`); what is left out is as
            in `model_init_kwargs`, without the policy's revision.
        reference_store: folder or fsspec address of a store of reference log-probs: what is there is read, what is
            missing is computed and added; unset: no store.
        reference_store_dtype: what the store keeps, `float32` or `float16`.
        precompute_ref_log_probs: fill the store before the first step; without `reference_store` it is in the output
            folder.
        precompute_ref_batch_size: rows per pass of that; unset: those of a training or evaluation batch.
        sync_ref_model: move the reference towards the policy during training (TR-DPO).
        ref_model_mixup_alpha: the policy's share in the reference after a move, above 0 and at most 1.
        ref_model_sync_steps: optimizer steps between two moves.

    Raises:
        ConfigError: a value that is not allowed, or values that say different things.
    """

    reference: Meaning | None = None
    reference_adapter: str | None = None
    reference_means: Means | None = None
    reference_snapshot: Keep | None = None
    reference_remote: dict[str, Any] | str | None = None
    reference_check_steps: int = 50
    ref_model_init_kwargs: dict[str, Any] | str | None = None
    reference_store: str | None = None
    reference_store_dtype: str = "float32"
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512

    def check_reference(self) -> None:
        """Find what is wrong with these options before anything is loaded."""
        if self.reference_means not in _MEANS:
            raise ConfigError(
                f"reference_means is {self.reference_means!r}; allowed are {', '.join(map(str, _MEANS))}."
            )
        if self.reference_snapshot not in (None, "device", "host"):
            raise ConfigError(f"reference_snapshot is {self.reference_snapshot!r}; allowed are None, device, host.")
        if self.reference_check_steps < 0:
            raise ConfigError(f"reference_check_steps is {self.reference_check_steps}; it must be 0 (never) or more.")
        if not self.sync_ref_model and (self.ref_model_mixup_alpha, self.ref_model_sync_steps) != (0.6, 512):
            raise ConfigError(
                "ref_model_mixup_alpha or ref_model_sync_steps came without sync_ref_model, so the reference would not "
                "move. Set sync_ref_model=True, or leave them out."
            )
        self._check_store()
        for name in ("ref_model_init_kwargs", "reference_remote"):
            setattr(self, name, keywords(name, getattr(self, name)))
        if self.reference_remote is not None:
            # A server alone is another model; it is the policy's start only where that is said, and then proved.
            self.reference = self.reference or "model"
            self.reference_means = self.reference_means or "remote"
        if self.reference_adapter is not None:
            if self.reference not in (None, "adapter"):
                raise ConfigError(
                    f"reference_adapter was given and reference is {self.reference!r}; the two say different things. "
                    "Leave one of them out."
                )
            self.reference = "adapter"
        if self.reference == "adapter" and self.reference_adapter is None:
            raise ConfigError(
                "reference is 'adapter' but no reference_adapter was given. Name one that is loaded on the policy, or "
                "give the folder of one."
            )
        if self.reference is not None or self.reference_means == "remote":
            self.reference_spec()

    def wants_store(self) -> bool:
        """Whether the reference's log-probabilities are kept."""
        return self.reference_store is not None or self.precompute_ref_log_probs

    def _check_store(self) -> None:
        """An option of the store that would do nothing, or that cannot be right, is an error."""
        if self.reference_store_dtype not in ("float32", "float16"):
            raise ConfigError(f"reference_store_dtype is {self.reference_store_dtype!r}; allowed are float32, float16.")
        if self.wants_store() and (self.reference == "none" or self.sync_ref_model):
            why = "a moving reference is another one after each move" if self.sync_ref_model else "reference is 'none'"
            raise ConfigError(
                f"reference_store or precompute_ref_log_probs came, but {why}, so there is nothing to store. Leave "
                "them out."
            )
        if self.reference_store == "":
            raise ConfigError("reference_store is empty; name a folder or an fsspec address, or leave it out.")
        if self.reference_store_dtype != "float32" and not self.wants_store():
            raise ConfigError("reference_store_dtype came without a store; set reference_store, or leave it out.")
        size = self.precompute_ref_batch_size
        if size is not None and (size < 1 or not self.precompute_ref_log_probs):
            raise ConfigError(
                f"precompute_ref_batch_size is {size}; it must be a whole number from 1, and needs "
                "precompute_ref_log_probs=True."
            )

    def reference_spec(self, meaning: Meaning | None = None, **found: Any) -> ReferenceSpec:
        """The declaration; `found` are fields that only the trainer knows, such as the other model."""
        remote = self.reference_remote
        try:
            options = RemoteOptions(**remote) if isinstance(remote, dict) else None
        except TypeError as error:
            names = ", ".join(RemoteOptions.__dataclass_fields__)
            raise ConfigError(f"reference_remote is {remote!r}; its keys may be {names} ({error}).") from error
        return ReferenceSpec(
            meaning=meaning or self.reference or "start",
            means=self.reference_means,
            keep=self.reference_snapshot,
            remote=options,
            sync=Sync(self.ref_model_sync_steps, self.ref_model_mixup_alpha) if self.sync_ref_model else None,
            **found,
        )


def keywords(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A mapping that may be given as JSON text, as on a command line.

    Raises:
        ConfigError: no JSON object.
    """
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError as error:
        raise ConfigError(f"{name} is {value!r}, which is no JSON ({error}); pass a dictionary.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{name} is {value!r}; it must be a JSON object, or a dictionary.")
    return found
