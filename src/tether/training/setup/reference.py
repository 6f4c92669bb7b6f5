"""From a trainer's arguments to the declaration of the reference: loads what it names, before the first update."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from tether.compat.accelerate import shard_by_fsdp2, stage3_settings, uses_fsdp2
from tether.compat.deepspeed import inference_engine
from tether.compat.transformers import commit_of
from tether.errors import ConfigError, ReferencePolicyError
from tether.models import load_policy, load_tokenizer
from tether.models.adapters import continue_adapter, in_one_way
from tether.models.adapting.adapter_files import adapter_config, put_on
from tether.models.adapting.extra_tensors import refuse_brought, refuse_lost
from tether.models.fingerprint import model_fingerprint
from tether.models.fingerprint_files import checkpoint_fingerprint
from tether.models.load import check_source
from tether.models.partitioned import whole_weights
from tether.models.spec import ModelSpec
from tether.models.structure import dtype_of, transformers_model, unwrap
from tether.reference import (
    GuardResult,
    Reference,
    ReferenceSpec,
    compare_with_start,
    refuse_other_tokenizer,
    require_start_equality,
    why_not_at_start,
)
from tether.reference.base import Scorer
from tether.reference.methods.model import may_move
from tether.training.config import PreferenceConfig
from tether.training.setup.policy import source_of
from tether.types import Meaning, ScoringBatch

logger = logging.getLogger("tether")
_ADAPTER = "reference"


def declared_meaning(args: PreferenceConfig, ref_model: Any) -> Meaning:
    """What the reference means, from the configuration and `ref_model`.

    Raises:
        ConfigError: the two say different things, or there is no such model.
    """
    if ref_model is not None and not args.needs_reference:
        raise ConfigError(
            f"ref_model was given, and {args.objective_name} compares with no reference, so that it would never be "
            "used. Leave it out, or take a loss that has a reference."
        )
    if ref_model is not None and args.reference not in (None, "model"):
        raise ConfigError(
            f"ref_model was given and reference is {args.reference!r}; the two say different things. Leave one "
            "of them out."
        )
    remote = args.reference_method == "remote"
    if ref_model is not None and remote:
        raise ConfigError(
            "ref_model was given and the reference is to be computed by a server; no second model is needed then. "
            "Leave ref_model out, or leave reference_remote out."
        )
    if ref_model is None and args.reference == "model" and not remote:
        raise ConfigError("reference is 'model' but no ref_model was given. Pass ref_model, or leave reference unset.")
    if args.ref_model_init_kwargs and not isinstance(ref_model, (str, Path)):
        raise ConfigError(
            "ref_model_init_kwargs was given without a ref_model that is named by a string. Leave them out."
        )
    if not args.needs_reference:
        return "none"
    if isinstance(ref_model, (str, Path)):  # what is not there is said before anything is loaded
        reference_model_spec(args, str(ref_model)).load_config()
    return args.reference or ("start" if ref_model is None else "model")


@whole_weights()
def reference_spec(
    args: PreferenceConfig,
    meaning: Meaning,
    ref_model: str | Path | nn.Module | None,
    policy: nn.Module,
    policy_source: str,
    tokenizer: PreTrainedTokenizerBase,
    before: str | None,
) -> ReferenceSpec:
    """The declaration with what it names: another model is loaded and placed, an adapter is added beside the policy's.

    `before` is the fingerprint of the policy before this run put an adapter on it, see `base_fingerprint`.

    Raises:
        ConfigError: what is named cannot be loaded.
        ReferencePolicyError: another tokenizer than the policy's.
    """
    source, reload = policy_source, None
    if isinstance(ref_model, (str, Path)):
        source, reload = str(ref_model), partial(_load_reference, args, str(ref_model), tokenizer)
        ref_model = reload()
    elif ref_model is not None:
        source = source_of(ref_model)
        ref_model = in_one_way(ref_model)
        _place(ref_model, args.device)
    # A snapshot that a full store has made unnecessary is moved to a file beside the run's others.
    found: dict[str, Any] = {"spill": Path(str(args.output_dir))} if args.wants_store() else {}
    if meaning == "base":
        found["base"] = partial(base_fingerprint, policy, before)
    if meaning == "adapter":
        source = str(args.reference_adapter)
        found["adapter"], ref_model = _adapter(args, policy)
        if ref_model is not None:
            meaning = "model"
            del found["adapter"]
    described = policy if ref_model is None else ref_model
    revision = commit_of(transformers_model(described))
    return args.reference_spec(meaning, model=ref_model, source=source, revision=revision, reload=reload, **found)


def reference_model_spec(args: PreferenceConfig, source: str) -> ModelSpec:
    """How another model that is the reference is loaded: as the policy is, but for what was said of it alone.

    Args:
        args: of the run.
        source: the other model's name.
    """
    own = cast(dict[str, Any], args.ref_model_init_kwargs or {})
    quantizations = {"quantization", "quantization_config"}
    # These belong to the policy alone; and one of the two ways to say a quantisation replaces the other.
    left = {
        "revision",
        "tokenizer",
        "adapter",
        "trust_remote_code",
        *(quantizations if quantizations & own.keys() else ()),
    }
    options = {
        key: value for key, value in cast(dict[str, Any], args.model_init_kwargs or {}).items() if key not in left
    }
    return ModelSpec.of(source, {**options, **own}, trust_remote_code=args.trust_remote_code)


def _load_reference(args: PreferenceConfig, source: str, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    spec = reference_model_spec(args, source)
    try:
        theirs = load_tokenizer(
            spec.tokenizer or source, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except ConfigError:
        logger.info(f"reference: {source} comes without a tokenizer, so it was not compared with the policy's")
    else:
        refuse_other_tokenizer(tokenizer, theirs)
    model = spec.load()
    _place(model, args.device)
    return model


def _place(model: nn.Module, device: torch.device) -> None:
    """Put a reference model on the run's device, unless it was loaded to a place of its own."""
    if may_move(model):
        model.to(device)


def _adapter(args: PreferenceConfig, policy: nn.Module) -> tuple[str, nn.Module | None]:
    """The loaded adapter that was named; or a second model, where the policy has no adapter to put it beside."""
    named, inner = str(args.reference_adapter), unwrap(policy)
    loaded = list(inner.peft_config) if isinstance(inner, PeftModel) else []
    if named in loaded:
        return named, None
    folder = Path(named).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"reference_adapter is {named!r}, which is neither an adapter that is loaded on the policy "
            f"({', '.join(map(repr, loaded)) or 'none is'}) nor a folder with adapter_config.json."
        )
    check_source(folder)
    _require_same_base(folder, inner)
    if not isinstance(inner, PeftModel):
        twin = continue_adapter(copy.deepcopy(inner), folder)
        return named, twin.requires_grad_(False).to(args.device)
    if _ADAPTER in loaded:
        raise ConfigError(
            f"The policy already has an adapter called {_ADAPTER!r}, the name that one loaded from a folder gets. "
            f"Rename it, or give reference_adapter={_ADAPTER!r} if that is the reference."
        )
    refuse_brought(inner, folder)
    trains = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
    try:
        with put_on(inner, folder):
            report = inner.load_adapter(str(folder), _ADAPTER, is_trainable=False, torch_device=str(args.device))
    except ConfigError as error:
        raise ConfigError(
            f"The adapter {named!r} cannot be loaded beside the policy's: {error} Or merge it into a copy of its base "
            "and give that model as ref_model."
        ) from error
    for parameter, value in trains:
        parameter.requires_grad_(value)
    lacking = [key for key in report.missing_keys if f".{_ADAPTER}." in key]
    if lacking:
        raise ConfigError(
            f"The adapter {named!r} lacks {len(lacking)} tensors that its configuration asks for, such as "
            f"{lacking[0]!r}; they would be random. Give a complete adapter."
        )
    refuse_lost(inner, folder, _ADAPTER)
    return _ADAPTER, None


def _require_same_base(folder: Path, policy: nn.Module) -> None:
    """Say so when an adapter was made for another model than the policy's; a moved folder is no proof of it."""
    theirs = adapter_config(folder).base_model_name_or_path
    ours = source_of(policy)
    if theirs and theirs != ours:
        logger.warning(f"reference: the adapter {folder} was made on {theirs!r} and the policy comes from {ours!r}")


def check_start(
    policy: nn.Module, reference: Reference, scorer: Scorer, probe: ScoringBatch, updates: int
) -> GuardResult | None:
    """Compare the policy with a `start` reference before the first step; None for another meaning.

    Args:
        policy: as it is now.
        reference: of the run.
        scorer: the scoring function.
        probe: a few rows.
        updates: that the trainer has made before.

    Raises:
        ReferencePolicyError: the policy is not at its reference.
    """
    if reference.identity.meaning != "start":
        return None
    found = compare_with_start(policy, reference, scorer, probe, reference.tolerance)
    logger.info(
        f"start equality: at most {found.max_difference:.1e} nats between policy and reference on "
        f"{found.rows} rows, {found.tokens} tokens (allowed {reference.tolerance:.0e})"
    )
    if not found.passed:
        require_start_equality(found, reference, why_not_at_start(policy, reference, updates))
    return found


def base_fingerprint(policy: nn.Module, before: str | None) -> str | None:
    """Fingerprint of the base under a policy's adapters, as its source has it; None where there is no source to read.

    Args:
        policy: with its adapters.
        before: the same of the policy before this run put an adapter on it; None if it came with one.
    """
    if before is not None:
        return before
    model = transformers_model(policy)
    source, dtype = model.config.name_or_path, dtype_of(policy)
    if not source:
        return None
    try:
        if Path(source).is_dir():
            return checkpoint_fingerprint(source, dtype=dtype)
    except ReferencePolicyError:
        pass  # its files do not say what the model will be
    try:
        base = load_policy(source, dtype=dtype, revision=commit_of(model))
    except ConfigError:
        return None
    return model_fingerprint(base, without_adapters=True)


def shard_reference(reference: Reference, accelerator: Accelerator) -> None:
    """Cut a reference model as this run's policy is cut; nothing for another reference, or for a run without shards.

    One that is quantised, or spread over devices by a map, stays as it was loaded.

    Args:
        reference: the resolved one, whole until now, since it was hashed and proved.
        accelerator: of the run, after the policy was prepared.
    """
    put = _shards_of(accelerator)
    if put is not None:
        reference.place(put)


def _shards_of(accelerator: Accelerator) -> Any:
    if accelerator.distributed_type == DistributedType.FSDP and uses_fsdp2(accelerator):
        return partial(shard_by_fsdp2, accelerator)
    settings = stage3_settings(accelerator) if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return None if settings is None else partial(inference_engine, config=settings)
