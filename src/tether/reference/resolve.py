"""From the declared meaning to a reference: choose the means, check it, say why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from tether.errors import ConfigError, ReferenceError
from tether.models.fingerprint import model_fingerprint
from tether.models.structure import adapter_tensors, dtype_of, trainable_tensors, unwrap
from tether.reference.adapter_off import AdapterOffReference
from tether.reference.guard import compare_with_start
from tether.reference.none import NoReference
from tether.reference.protocol import Reference, Scorer
from tether.reference.separate import ModelReference, refuse_wrong_model
from tether.reference.snapshot import SnapshotReference
from tether.types import Meaning, Means, ReferenceIdentity, ScoringBatch

# Two passes of the same kernels over the same weights differ by nothing; this leaves room for kernels that do not
# repeat to the bit, in any dtype.
SAME = 1e-5

MEANS: dict[Meaning, tuple[Means, ...]] = {
    "start": ("adapter_off", "snapshot", "model"),
    "base": ("adapter_off", "snapshot"),
    "model": ("model",),
    "none": ("none",),
}
# Initialisations that write into the base weights, so that what is under the adapter is no longer the base.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "orthogonal")


@dataclass(frozen=True)
class ReferenceSpec:
    """What the user declared.

    Args:
        meaning: `start`, `base`, `model` or `none`.
        means: forced means, or None to let Tether choose.
        model: the other model, for `model`.
        source: where the policy (or, for `model`, the other model) came from, for the record.
        revision: commit of the source where it has one.
        reload: loads the other model again after a full store let it go; None for a model that was given in memory.
    """

    meaning: Meaning = "start"
    means: Means | None = None
    model: nn.Module | None = None
    source: str = "object in memory"
    revision: str | None = None
    reload: Callable[[], nn.Module] | None = None

    def __post_init__(self) -> None:
        if self.meaning not in MEANS:
            raise ConfigError(f"reference: {self.meaning!r} came; allowed are {', '.join(MEANS)}.")
        if self.means is not None and self.means not in MEANS[self.meaning]:
            raise ConfigError(
                f"reference means {self.means!r} cannot compute the meaning {self.meaning!r}; allowed are "
                f"{', '.join(MEANS[self.meaning])}, or leave it unset and Tether chooses."
            )


@dataclass(frozen=True)
class Resolved:
    """A reference and the line that says what it is and why."""

    reference: Reference
    line: str


def resolve(
    spec: ReferenceSpec,
    policy: nn.Module,
    probe: ScoringBatch,
    scorer: Scorer,
    scorer_for: Callable[[nn.Module], Scorer],
) -> Resolved:
    """Build the declared reference of a policy that has not been updated yet.

    Args:
        spec: the declaration.
        policy: the model to be trained, as it is at the start.
        probe: a few real rows, on the policy's device.
        scorer: the scoring function in the policy's layout.
        scorer_for: gives the scoring function for another model, after proving its layout.

    Returns:
        The reference with its line for the log.

    Raises:
        ReferenceError: a forced means that cannot be right, or a model that cannot be a reference.
    """
    if spec.meaning == "none":
        return Resolved(NoReference(), "reference: none; no reference is loaded or run")
    if spec.meaning == "model":
        if spec.model is None:
            raise ConfigError("reference: model came without a model; pass `ref_model`, or name one in the run file.")
        refuse_wrong_model(policy, spec.model)
        identity = _identity(spec, "model", spec.model, without_adapters=False)
        reference = ModelReference(spec.model, scorer_for(spec.model), identity, spec.reload)
        return Resolved(reference, f"reference: model, by model: {spec.source} ({identity.dtype}), frozen")
    return (_resolve_start if spec.meaning == "start" else _resolve_base)(spec, policy, probe, scorer)


def _resolve_start(spec: ReferenceSpec, policy: nn.Module, probe: ScoringBatch, scorer: Scorer) -> Resolved:
    objection = _objection_to_adapter_off(policy, probe, scorer)
    # The fingerprint is of the function, whatever the means: an adapter that changes nothing is no part of it, so that
    # its rank and its random half are none either.
    idle = isinstance(unwrap(policy), PeftModel) and not _adapter_in_effect(policy, probe, scorer)
    if spec.means == "adapter_off" and objection:
        raise ReferenceError(
            f"reference: start, by adapter_off, was asked for, but that would not be the start: {objection}. "
            "Leave `reference_means` unset, or set it to snapshot."
        )
    trainable = trainable_tensors(policy)
    if spec.means == "model":
        twin = copy.deepcopy(unwrap(policy))
        reference = ModelReference(twin, scorer, _identity(spec, "model", policy, without_adapters=idle))
        return Resolved(
            reference, f"reference: start, by model: a frozen copy of all {_count(twin)} parameters, as forced"
        )
    if spec.means == "snapshot" or objection:
        identity = _identity(spec, "snapshot", policy, without_adapters=idle)
        why = "as forced" if spec.means else f"because {objection}"
        size = sum(tensor.numel() * tensor.element_size() for tensor in trainable.values()) / 2**20
        line = f"reference: start, by snapshot: {len(trainable)} trainable tensors kept ({size:.1f} MiB), {why}"
        return Resolved(SnapshotReference(policy, scorer, identity, trainable, idle_adapter=idle), line)
    identity = _identity(spec, "adapter_off", policy, without_adapters=True)
    line = f"reference: start, by adapter_off: {len(trainable)} trainable tensors, all inside adapter {_active(policy)}"
    return Resolved(AdapterOffReference(policy, scorer, identity), line)


def _resolve_base(spec: ReferenceSpec, policy: nn.Module, probe: ScoringBatch, scorer: Scorer) -> Resolved:
    rewritten = _rewritten_base(policy)
    if rewritten:
        raise ReferenceError(
            f"reference: base was asked for, but {rewritten} wrote into the base weights, so the model without "
            "its adapter is no longer the base. Use reference: start, or name the base as reference: {model: ...}."
        )
    outside = _outside_adapter(policy)
    if spec.means == "adapter_off" and (outside or not adapter_tensors(policy)):
        raise ReferenceError(
            "reference: base, by adapter_off, was asked for, but "
            + (f"{_some(outside)} outside the adapter would train." if outside else "the policy has no adapter.")
            + " Leave `reference_means` unset, or set it to snapshot."
        )
    if spec.means == "snapshot" or outside:
        identity = _identity(spec, "snapshot", policy, without_adapters=True)
        reference = SnapshotReference(policy, scorer, identity, outside, without_adapter=True)
        return Resolved(reference, f"reference: base, by snapshot: {_some(outside)} outside any adapter kept")
    identity = _identity(spec, "adapter_off", policy, without_adapters=True)
    return Resolved(AdapterOffReference(policy, scorer, identity), "reference: base, by adapter_off")


def _objection_to_adapter_off(policy: nn.Module, probe: ScoringBatch, scorer: Scorer) -> str:
    """Why switching the adapter off would not give the start; empty where it would."""
    if not isinstance(unwrap(policy), PeftModel):
        return "the policy has no adapter"
    outside = _outside_adapter(policy)
    if outside:
        return f"{_some(outside)} outside the adapter would train"
    return _adapter_in_effect(policy, probe, scorer)


def _adapter_in_effect(policy: nn.Module, probe: ScoringBatch, scorer: Scorer) -> str:
    """What the adapter changes as it is now; empty where the policy without it is the same function."""
    learnt = _learnt_for_some_tokens(policy)
    if learnt:
        return f"the adapter on {learnt!r} already holds something"
    off = AdapterOffReference(policy, scorer, NoReference.identity)
    result = compare_with_start(policy, off, scorer, probe, SAME)
    if result.passed:
        return ""
    rewritten = _rewritten_base(policy)
    because = f"{rewritten} rewrote the base weights" if rewritten else "the adapter already holds something"
    return f"without the adapter a token is {result.max_difference:.2g} nats from the start ({because})"


def _learnt_for_some_tokens(policy: nn.Module) -> str:
    """Path of an adapter part that has learnt and acts on few tokens, which a probe may lack; empty for none."""
    for path, module in unwrap(policy).named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            original, active = list(module.original_module.parameters()), module.active_adapters
            pairs = [(copied, original) for name, copied in module.modules_to_save.items() if name in active]
            differs = any(
                not torch.equal(*pair) for copied, base in pairs for pair in zip(copied.parameters(), base, strict=True)
            )
        elif isinstance(module, TrainableTokensLayer):
            originals: Any = module.trainable_tokens_original
            deltas = module.trainable_tokens_delta.items()
            differs = any(not torch.equal(delta, originals[name]) for name, delta in deltas)
        elif isinstance(module, LoraEmbedding):
            differs = any(bool(module.get_delta_weight(name).any()) for name in module.active_adapters)
        else:
            continue
        if differs:
            return path
    return ""


def _rewritten_base(policy: nn.Module) -> str:
    inner = unwrap(policy)
    configs = inner.peft_config if isinstance(inner, PeftModel) else {}
    for name, config in configs.items():
        init = getattr(config, "init_lora_weights", None)
        if isinstance(init, str) and init.lower().startswith(_REWRITES_BASE):
            return f"adapter {name!r} with init_lora_weights={init!r}"
    return ""


def _outside_adapter(policy: nn.Module) -> dict[str, Tensor]:
    inside = {id(tensor) for tensor in adapter_tensors(policy).values()}
    return {name: tensor for name, tensor in trainable_tensors(policy).items() if id(tensor) not in inside}


def _identity(spec: ReferenceSpec, means: Means, model: nn.Module, *, without_adapters: bool) -> ReferenceIdentity:
    return ReferenceIdentity(
        meaning=spec.meaning,
        means=means,
        source=spec.source,
        revision=spec.revision,
        dtype=str(dtype_of(model)).removeprefix("torch."),
        fingerprint=model_fingerprint(unwrap(model), without_adapters=without_adapters),
    )


def _some(tensors: dict[str, Tensor]) -> str:
    return f"{len(tensors)} tensors" + (f", such as {next(iter(tensors))!r}," if tensors else "")


def _active(policy: nn.Module) -> str:
    inner = unwrap(policy)
    names = inner.active_adapters if isinstance(inner, PeftModel) else []
    return ", ".join(repr(name) for name in names)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
