"""From the declared meaning to a reference: choose the method, check it, say why."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from tether.errors import ConfigError, ReferencePolicyError
from tether.models.adapting.perturbation import perturbed
from tether.models.fingerprint import fingerprint, model_fingerprint
from tether.models.structure import (
    adapter_configs,
    adapter_on,
    adapter_tensors,
    adapters_off,
    dtype_of,
    trainable_tensors,
    unwrap,
)
from tether.reference.base import SAME, Reference, Scorer, log_probs
from tether.reference.guard import GuardResult, compare_with_start, largest_difference
from tether.reference.methods.adapter import AdapterOffReference, AdapterOnReference
from tether.reference.methods.adapter_check import (
    acting_layer,
    active_adapters,
    learnt_for_some_tokens,
    outside_adapters,
    rewritten_base,
    some,
    trainable_of_adapter,
)
from tether.reference.methods.model import ModelReference, refuse_wrong_model
from tether.reference.methods.moving import MovingModelReference
from tether.reference.methods.none import NoReference
from tether.reference.methods.remote import RemoteReference
from tether.reference.methods.shards import free_memory
from tether.reference.methods.snapshot import SnapshotReference
from tether.reference.spec import Keep, ReferenceSpec
from tether.types import Meaning, Method, ReferenceIdentity, ScoringBatch


@dataclass(frozen=True)
class Resolved:
    """A reference and the line that says what it is and why."""

    reference: Reference
    line: str


@dataclass(frozen=True)
class _Run:
    """What the resolvers look at: the declaration, the policy before its first update, probe rows, and scoring."""

    spec: ReferenceSpec
    policy: nn.Module
    probe: ScoringBatch
    scorer: Scorer
    scorer_for: Callable[[nn.Module], Scorer]


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
        ReferencePolicyError: a forced method that cannot be right, or a model that cannot be a reference.
    """
    if spec.meaning == "none":
        return Resolved(NoReference(), "reference: none; no reference is loaded or run")
    run = _Run(spec, policy, probe, scorer, scorer_for)
    if spec.method == "remote":
        return _resolve_remote(run)
    resolver = {
        "start": _resolve_start,
        "base": _resolve_base,
        "adapter": _resolve_adapter,
        "model": _resolve_model,
    }[spec.meaning]
    return resolver(run)


def _resolve_model(run: _Run) -> Resolved:
    spec, model = run.spec, run.spec.model
    if model is None:
        raise ConfigError("reference is model, but no model was given; pass `ref_model`, or name one in the run file.")
    refuse_wrong_model(run.policy, model)
    identity = _identity(spec, "model", model, without_adapters=False)
    where = f"{spec.source} ({identity.dtype}, {next(model.parameters()).device})"
    if spec.sync is not None:
        identity = replace(identity, sync=str(spec.sync))
        moving = MovingModelReference(run.policy, model, run.scorer_for(model), identity, spec.sync)
        return Resolved(moving, f"reference: model, by model: {where}; it moves {spec.sync}")
    reference = ModelReference(model, run.scorer_for(model), identity, spec.reload)
    return Resolved(reference, f"reference: model, by model: {where}, frozen")


def _resolve_start(run: _Run) -> Resolved:
    spec, policy = run.spec, run.policy
    off = _without_adapter(run)
    objection = off.objection or _moving(spec)
    if spec.method == "adapter_off" and objection:
        raise ReferencePolicyError(
            f"reference: start, by adapter_off, was asked for, but that would not be the start: {objection}. "
            "Leave `reference_method` unset, or set it to snapshot."
        )
    trainable = trainable_tensors(policy)
    # What the start computes decides its fingerprint, so that every method of one start has the same.
    identity = _identity(spec, spec.method or "snapshot", policy, without_adapters=off.is_start)
    method, why = choose(spec, objection)
    if method == "model":
        twin = copy.deepcopy(unwrap(policy))
        what = f"a frozen copy of all {_count(twin)} parameters, as forced"
        return _measured_at_start(run, ModelReference(twin, run.scorer, identity), what)
    if method == "snapshot":
        again = partial(_start_fingerprint, run)
        return _measured_at_start(run, *_snapshot(run, identity, trainable, why, fingerprint=again, sync=spec.sync))
    identity = replace(identity, method="adapter_off")
    what = f"{len(trainable)} trainable tensors, all inside adapter {active_adapters(policy)}"
    return _measured_at_start(run, AdapterOffReference(policy, run.scorer, identity), what)


def _resolve_base(run: _Run) -> Resolved:
    spec, policy = run.spec, run.policy
    source = spec.base() if spec.base is not None else None
    rewritten = rewritten_base(policy, source)
    if rewritten:
        raise ReferencePolicyError(
            f"reference: base was asked for, but {rewritten} wrote into the base weights, so the model without "
            "its adapter is no longer the base. Use reference: start, or name the base as reference: {model: ...}."
        )
    known = "; its weights are the source's" if source is not None else "; there is no source to compare it with"
    outside = outside_adapters(policy)
    if spec.method == "adapter_off" and (outside or not adapter_tensors(policy)):
        raise ReferencePolicyError(
            "reference: base, by adapter_off, was asked for, but "
            + (f"{some(outside)} outside the adapter would train." if outside else "the policy has no adapter.")
            + " Leave `reference_method` unset, or set it to snapshot."
        )
    # Forced or not, what trains outside an adapter has to be kept.
    method, why = choose(spec, _would_train(outside, "outside any adapter "))
    identity = _identity(spec, method, policy, without_adapters=True)
    if method == "adapter_off":
        what = f"adapter {active_adapters(policy)} switched off" if adapter_tensors(policy) else "no adapter, no update"
        line = f"reference: base, by adapter_off: {what}{known}"
        return Resolved(AdapterOffReference(policy, run.scorer, identity), line)
    reference, what = _snapshot(
        run,
        identity,
        outside,
        why,
        around=partial(adapters_off, policy),
        fingerprint=lambda: model_fingerprint(unwrap(policy), without_adapters=True),
    )
    return Resolved(reference, f"reference: base, by snapshot: {what}{known}")


def _resolve_adapter(run: _Run) -> Resolved:
    spec, policy, name = run.spec, run.policy, run.spec.adapter or ""
    inner = unwrap(policy)
    if not isinstance(inner, PeftModel) or name not in inner.peft_config:
        known = ", ".join(map(repr, inner.peft_config)) if isinstance(inner, PeftModel) else "none"
        raise ConfigError(f"reference: adapter {name!r} is not loaded on the policy; loaded are {known}.")
    moving = _moving_of_adapter(policy, name)
    if spec.method == "adapter_on" and moving:
        raise ReferencePolicyError(
            f"reference: adapter {name!r}, by adapter_on, was asked for, but {some(moving)} that it computes with "
            "would train. Leave `reference_method` unset, or set it to snapshot."
        )
    if spec.sync is not None and moving.keys() != trainable_tensors(policy).keys():
        raise ConfigError(
            f"sync was asked for with the adapter {name!r} as the reference, but adapter {active_adapters(policy)} "
            "trains. The factors of two adapters stand for nothing when they are mixed. Train that adapter itself, as "
            "in `model: its folder` with `reference: start`, or turn sync off."
        )
    method, why = choose(spec, _would_train(moving))
    again = partial(_adapter_fingerprint, inner, name)
    identity = _identity(spec, method, policy, known=again())
    if method == "model":
        with adapter_on(policy, name):
            twin = copy.deepcopy(inner)
        line = f"reference: adapter {name!r}, by model: a frozen copy with all {_count(twin)} parameters, as forced"
        return Resolved(ModelReference(twin, run.scorer, identity), line)
    if method == "adapter_on":
        line = f"reference: adapter {name!r}, by adapter_on: frozen beside adapter {active_adapters(policy)}"
        return Resolved(AdapterOnReference(policy, run.scorer, identity, name), line)
    around = partial(adapter_on, policy, name)
    reference, what = _snapshot(run, identity, moving, why, around=around, fingerprint=again, sync=spec.sync)
    return Resolved(reference, f"reference: adapter {name!r}, by snapshot: {what}")


def _resolve_remote(run: _Run) -> Resolved:
    spec, policy = run.spec, run.policy
    options = spec.remote
    assert options is not None
    if spec.meaning == "model":
        identity = _identity(spec, "remote", policy, known="served")
        reference = RemoteReference(options, identity, policy, run.probe)
        proof = "; the weights are the server's, and its answers were checked for consistency only"
    else:
        plain = spec.meaning == "base"
        local = _resolve_base if plain else _resolve_start
        here = local(replace(run, spec=replace(spec, method=None, remote=None))).reference
        reference = RemoteReference(options, replace(here.identity, method="remote"), policy, run.probe)
        difference = reference.require_parity(here)
        proof = f"; at most {difference:.1e} nats from the same computed here on {run.probe.num_examples} rows"
    return Resolved(reference, f"reference: {spec.meaning}, by remote: {reference.where}{proof}")


@dataclass(frozen=True)
class _WithoutAdapter:
    """What the policy is without its adapter: whether it is the start, and why it would not stay so."""

    is_start: bool
    objection: str


def structural_objection(policy: nn.Module) -> str:
    """Why a policy without its adapter is not, or will not stay, its start, by what it is made of; empty for no reason.

    It looks at no value, so that a model without weights has the same answer.
    """
    if not adapter_configs(policy):
        return "the policy has no adapter"
    outside = outside_adapters(policy)
    return f"{some(outside)} outside the adapter would train" if outside else ""


HOLDS_SOMETHING = "the adapter already holds something, or its base was rewritten"


def _without_adapter(run: _Run) -> _WithoutAdapter:
    policy = run.policy
    objection = structural_objection(policy)
    if not adapter_configs(policy):
        return _WithoutAdapter(False, objection)
    learnt = learnt_for_some_tokens(policy)
    if learnt:
        return _WithoutAdapter(False, objection or f"the adapter on {learnt!r} already holds something")
    off = AdapterOffReference(policy, run.scorer, NoReference.identity)
    result = compare_with_start(policy, off, run.scorer, run.probe, SAME)
    if not result.passed:
        # What was measured says more than what the policy is made of.
        far = f"without the adapter a token is {result.max_difference:.2g} nats from the start"
        return _WithoutAdapter(False, f"{far} ({HOLDS_SOMETHING})")
    acting = acting_layer(policy)
    if acting:
        return _WithoutAdapter(False, objection or acting)
    start = log_probs(off, run.probe)
    with perturbed(policy):
        moved = largest_difference(log_probs(off, run.probe), start)
    if moved > SAME:
        return _WithoutAdapter(False, objection or f"the adapter acts by {moved:.2g} nats while it is switched off")
    return _WithoutAdapter(True, objection)


# How each meaning is computed where nothing speaks against it.
_CHEAPEST: dict[Meaning, Method] = {
    "none": "none",
    "start": "adapter_off",
    "base": "adapter_off",
    "adapter": "adapter_on",
    "model": "model",
}


def choose(spec: ReferenceSpec, objection: str) -> tuple[Method, str]:
    """The method of a declared reference, and why where it is not the cheapest one.

    Args:
        spec: the declaration.
        objection: what speaks against the cheapest method; empty for nothing.

    >>> choose(ReferenceSpec("start"), "the policy has no adapter")
    ('snapshot', 'because the policy has no adapter')
    >>> choose(ReferenceSpec("base"), "")
    ('adapter_off', '')
    """
    if spec.method is not None:
        return spec.method, "as forced"
    return ("snapshot", f"because {objection}") if objection else (_CHEAPEST[spec.meaning], "")


def expected_method(spec: ReferenceSpec, policy: nn.Module, *, at_zero: bool) -> tuple[Method, str]:
    """The method that `resolve` will choose and why, of a policy without weights; the proof is left to `resolve`.

    Args:
        spec: the declaration; what it names need not be loaded.
        policy: with its adapters, on any device.
        at_zero: whether the adapter begins without effect.
    """
    objections: dict[Meaning, Callable[[], str]] = {
        "start": lambda: structural_objection(policy) or ("" if at_zero else HOLDS_SOMETHING) or _moving(spec),
        "base": lambda: _would_train(outside_adapters(policy), "outside any adapter "),
        "adapter": lambda: _would_train(_moving_of_adapter(policy, spec.adapter or "")),
    }
    method, why = choose(spec, objections.get(spec.meaning, str)())
    words = {
        "none": "no reference is loaded or run",
        "adapter_off": f"{len(trainable_tensors(policy))} trainable tensors, all inside the adapter"
        if spec.meaning == "start"
        else "the adapter switched off"
        if adapter_configs(policy)
        else "no adapter, no update",
        "adapter_on": "an adapter, frozen beside the one that trains",
        "model": "another model, frozen" if spec.sync is None else f"it moves {spec.sync}",
    }
    return method, why or words[method]


def _moving(spec: ReferenceSpec) -> str:
    return "only a snapshot can move" if spec.sync is not None else ""


def _would_train(tensors: dict[str, Tensor], where: str = "") -> str:
    return f"{some(tensors)} {where}would train" if tensors else ""


def _moving_of_adapter(policy: nn.Module, name: str) -> dict[str, Tensor]:
    """What an adapter that is the reference computes with and the run would train."""
    return {**outside_adapters(policy), **trainable_of_adapter(policy, name)}


def _start_fingerprint(run: _Run) -> str:
    return model_fingerprint(unwrap(run.policy), without_adapters=_without_adapter(run).is_start)


def _adapter_fingerprint(policy: PeftModel, name: str) -> str:
    """Of the base weights and one adapter, whatever it is called and whatever else is loaded."""
    tensors = get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)
    config = policy.peft_config[name]
    decides = {key: getattr(config, key, None) for key in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora")}
    patterns = {key: dict(getattr(config, key, None) or {}) for key in ("rank_pattern", "alpha_pattern")}
    base = model_fingerprint(policy, without_adapters=True)
    extra = json.dumps([base, decides, patterns], sort_keys=True, default=str).encode()
    return fingerprint({key: value for key, value in tensors.items() if isinstance(value, Tensor)}, extra=extra)


def _snapshot(run: _Run, identity: ReferenceIdentity, tensors: dict[str, Tensor], why: str, **options):
    """A snapshot, and the words that say what is kept, where and why."""
    bytes_kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    keep, where = _place(run, bytes_kept)
    sync = options.get("sync")
    identity = replace(identity, method="snapshot", sync=str(sync) if sync else None)
    options = {"keep": keep, "spill": run.spec.spill, **options}
    reference = SnapshotReference(run.policy, run.scorer, identity, tensors, **options)
    moves = f"; it moves {sync}" if sync else ""
    what = f"{len(tensors)} trainable tensors kept ({bytes_kept / 2**20:.1f} MiB{where}), {why}{moves}"
    return reference, what


def _place(run: _Run, bytes_kept: int) -> tuple[Keep, str]:
    """Where a snapshot is kept: on the device unless training would then not fit."""
    device = next(run.policy.parameters()).device
    if run.spec.keep is not None:
        where = "in host memory" if run.spec.keep == "host" else f"on {device}"
        return run.spec.keep, f" {where}, as forced"
    free = free_memory(device)
    # Besides itself a snapshot needs room for gradients and an optimizer's two moments of the same tensors, the latter
    # in float32 at most, and the larger of these is not yet allocated when the reference is resolved.
    if free is not None and 4 * bytes_kept > 0.8 * free:
        return "host", f" in host memory, as {free / 2**30:.1f} GiB are free on {device}"
    return "device", ""


def _measured_at_start(run: _Run, reference: Reference, what: str) -> Resolved:
    """With the line that says how far the policy is from its reference before the first update."""
    result: GuardResult = compare_with_start(run.policy, reference, run.scorer, run.probe, reference.tolerance)
    proof = f"start equality {result.max_difference:.1e} nats on {result.rows} rows"
    return Resolved(reference, f"reference: start, by {reference.identity.method}: {what}; {proof}")


def _identity(
    spec: ReferenceSpec, method: Method, model: nn.Module, *, without_adapters: bool = False, known: str | None = None
) -> ReferenceIdentity:
    return ReferenceIdentity(
        meaning=spec.meaning,
        method=method,
        source=spec.source,
        revision=spec.revision,
        dtype=str(dtype_of(model)).removeprefix("torch."),
        fingerprint=known or model_fingerprint(unwrap(model), without_adapters=without_adapters),
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
