"""Adapters merged into their base: the right base, proved to compute what was trained, before and after loading."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from tether.compat.peft import tuner_layers
from tether.compat.transformers import is_quantized
from tether.data import text_tokenizer
from tether.errors import ConfigError, TetherError
from tether.evaluate.named_models import Loaded, NamedModel, placed
from tether.models import load_policy
from tether.models.adapters import kind_of
from tether.models.fingerprint import model_fingerprint
from tether.models.load import DTYPES, is_adapter
from tether.models.reward import load_reward_model
from tether.models.structure import adapters_off, dtype_of, transformers_model
from tether.reference.base import frozen_pass
from tether.reference.guard import largest_difference
from tether.scoring import pack, score_alone, tolerance
from tether.scoring.reward import reward_alone
from tether.types import Example, ScoringBatch

logger = logging.getLogger("tether")
# Of the rows that models are compared on where none are given.
_ROWS, _PROMPT, _COMPLETION = 4, 8, 24
_REFUSALS = (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Merged:
    """What was merged, and how far the result is from what was trained: the largest difference of a token, in nats.

    Args:
        folder: the new one.
        adapters: names of those that are in it.
        base: name of the base.
        base_proved: whether the base has the hash that the run recorded; None where none is comparable.
        dtype: of the weights that were written.
        trained_dtype: of the base as it was trained.
        parameters: numbers written.
        compared: log-probs that were compared, or rewards.
        rows: what they are of.
        effect: how much the adapters move them.
        merged: how far the merged model in memory is from the unmerged one.
        loaded: the same of the model as it is loaded from the folder.
        unit: of a difference.
    """

    folder: str
    adapters: tuple[str, ...]
    base: str
    base_proved: bool | None
    dtype: str
    trained_dtype: str
    parameters: int
    compared: int
    rows: str
    effect: float
    merged: float
    loaded: float
    unit: str


def merge(
    named: NamedModel,
    output: Path,
    *,
    examples: Sequence[Example] | None = None,
    dtype: str | None = None,
    any_base: bool = False,
) -> Merged:
    """Merge all active adapters of a folder into the base and write it as a whole model.

    Args:
        named: a run or folder with an adapter.
        output: a new folder.
        examples: what the models are compared on; None: random tokens.
        dtype: of the weights to write; None: as the base was trained.
        any_base: merge although the base is another one than was trained with.

    Raises:
        ConfigError: there is nothing to merge, or it cannot be merged; with the reason.
        TetherError: the merged model is another one than was trained.
    """
    _check(named, output, dtype)
    loaded = named.load()
    model = cast(PeftModel, loaded.model)
    if is_quantized(transformers_model(model)):
        raise ConfigError(
            f"The base of '{named.name}' is quantised, and what an adapter adds would be rounded to its few levels: "
            "the merged model would be another one. Use base and adapter together, or train on the base as it is."
        )
    proved = _prove_base(named, model, any_base)
    batch = _batch(loaded, examples)
    adapters, trained = tuple(model.active_adapters), dtype_of(model)
    unmerged = _values(named, model, batch)
    with adapters_off(model):
        effect = largest_difference(_values(named, model, batch), unmerged)
    whole = _merged(model, named)
    merged = largest_difference(_values(named, whole, batch), unmerged)
    limit = tolerance(whole)
    if not merged <= limit:
        raise TetherError(
            f"Merged, '{named.name}' is {merged:.1e} from what was trained (allowed {limit:.0e}), so nothing was "
            "written. An adapter of this kind cannot be merged: use base and adapter together."
        )
    whole.to(getattr(torch, dtype) if dtype else trained)
    apart = _write(whole, loaded, named, output, batch, unmerged, limit if dtype_of(whole) == trained else None)
    return Merged(
        folder=str(output),
        adapters=adapters,
        base=named.base_source()[0],
        base_proved=proved,
        dtype=_name(dtype_of(whole)),
        trained_dtype=_name(trained),
        parameters=sum(parameter.numel() for parameter in whole.parameters()),
        compared=len(unmerged),
        rows="random tokens" if examples is None else f"{len(examples)} rows",
        effect=effect,
        merged=merged,
        loaded=apart,
        unit="of a reward" if named.classifies else "nats",
    )


def _check(named: NamedModel, output: Path, dtype: str | None) -> None:
    if named.role == "reference":
        raise ConfigError(f"'{named.name}' is a reference; name the run itself, whose adapter is merged.")
    if dtype is not None and dtype not in DTYPES[1:]:
        raise ConfigError(f"--dtype is '{dtype}'; it must be {', '.join(DTYPES[1:])}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"The output '{output}' is there already. Name a new folder.")
    if not is_adapter(named.source):
        raise ConfigError(
            f"'{named.name}' leads to '{named.source}', which holds a whole model and no adapter: there is nothing to "
            "merge. Use the folder as it is."
        )


def _prove_base(named: NamedModel, model: PeftModel, any_base: bool) -> bool | None:
    """Whether the base is what was trained on, as far as the run recorded that."""
    run = named.trained
    identity = run.identity if run is not None else None
    # By another method the hash is not of the base alone.
    if identity is None or identity.method != "adapter_off" or identity.dtype != _name(dtype_of(model)):
        return None
    found = model_fingerprint(model, without_adapters=True)
    if found == identity.fingerprint:
        return True
    words = (
        f"The base '{named.base_source()[0]}' is {found}, and the adapter of '{named.name}' was trained on "
        f"{identity.fingerprint}"
    )
    if not any_base:
        raise ConfigError(
            f"{words}: its weights or the libraries that load it changed since, so the merged model would be another "
            "one. Put the base back, or merge all the same with --any-base."
        )
    logger.warning(f"{words}; merged all the same")
    return False


def _merged(model: PeftModel, named: NamedModel) -> nn.Module:
    """The base with its adapters merged, or the reason why that cannot be."""
    config = model.peft_config[model.active_adapters[0]]
    kind = kind_of(config)
    tuner: Any = model.base_model
    if config.is_prompt_learning or not hasattr(tuner, "merge_and_unload"):
        why = (
            "it puts virtual tokens before each row, which no weight can hold"
            if config.is_prompt_learning
            else ("PEFT has no way to write it into weights")
        )
        raise ConfigError(f"The adapter of '{named.name}' is {kind}, which cannot be merged: {why}.")
    _untie(model)
    try:
        with warnings.catch_warnings():
            # That embeddings are tied is taken care of above.
            warnings.filterwarnings("ignore", message=".*tie.*")
            return tuner.merge_and_unload(safe_merge=True, adapter_names=list(model.active_adapters))
    except _REFUSALS as error:
        raise ConfigError(
            f"The adapter of '{named.name}' ({kind}) cannot be merged: {' '.join(str(error).split())}"
        ) from error


def _untie(model: PeftModel) -> None:
    """A weight that an adapter writes into and that another layer shares becomes that layer's own."""
    base = transformers_model(model)
    owners: dict[int, int] = {}
    for _, parameter in base.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    untied = False
    for _, layer in tuner_layers(base):
        inner = layer.get_base_layer()
        weight = getattr(inner, "weight", None)
        if weight is not None and owners.get(id(weight), 0) > 1:
            inner.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            owners[id(weight)] -= 1
            untied = True
    if untied:
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False


def _write(
    whole: nn.Module,
    loaded: Loaded,
    named: NamedModel,
    output: Path,
    batch: ScoringBatch,
    unmerged: Tensor,
    limit: float | None,
) -> float:
    """Write beside the place, load it from there, compare, and give it its name; how far the loaded model is."""
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        inner = transformers_model(whole)
        inner.save_pretrained(part)
        loaded.processing.save_pretrained(part)
        load: Any = load_reward_model if named.classifies else load_policy
        again = placed(load(part, dtype=dtype_of(whole)))
        if named.classifies:
            again.config.get_text_config().pad_token_id = text_tokenizer(loaded.processing).pad_token_id  # type: ignore
        apart = largest_difference(_values(named, again, batch), unmerged)
        if limit is not None and not apart <= limit:
            raise TetherError(
                f"As it is loaded, the merged model of '{named.name}' is {apart:.1e} from what was trained (allowed "
                f"{limit:.0e}), so it was removed again. Use base and adapter together, and report this."
            )
        if output.is_dir():
            output.rmdir()
        part.rename(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return apart


def _batch(loaded: Loaded, examples: Sequence[Example] | None) -> ScoringBatch:
    if examples is not None:
        return pack(examples[:_ROWS])
    generator = torch.Generator().manual_seed(0)
    known = len(loaded.tokenizer)
    found = []
    for _ in range(_ROWS):
        ids = torch.randint(known, (_PROMPT + _COMPLETION,), generator=generator).tolist()
        found.append(Example.of(ids[:_PROMPT], [ids[_PROMPT:]]))
    return pack(found)


def _values(named: NamedModel, model: nn.Module, batch: ScoringBatch) -> Tensor:
    """Log-probs of tokens, or rewards, the plainest way."""
    alone = reward_alone if named.classifies else score_alone
    with frozen_pass(model):
        return alone(model, batch.to(next(model.parameters()).device)).cpu()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
