"""A model that was named, a policy or a run's reference, loaded to be looked at as it was trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.data import text_tokenizer
from tether.errors import ConfigError, ReferencePolicyError
from tether.models import load_policy
from tether.models.adapters import continue_adapter
from tether.models.adapting.adapter_files import adapter_config
from tether.models.fingerprint import model_fingerprint
from tether.models.load import DTYPES, check_source, is_adapter, load_processing
from tether.models.reward import is_classifier, load_reward_model
from tether.models.spec import ModelSpec, embed_tokens
from tether.models.structure import adapter_configs, adapters_off, dtype_of
from tether.reference.base import frozen_pass
from tether.reference.methods.model import may_move
from tether.training import PreferenceConfig
from tether.training.algorithms.base import Algorithm
from tether.training.algorithms.reward import Reward
from tether.training.setup.policy import policy_spec, processing_of
from tether.training.setup.reference import reference_model_spec
from tether.types import ReferenceIdentity

logger = logging.getLogger("tether")
# What a quantised base was loaded with belongs to its source and not to what was saved of it.
_OF_THE_SOURCE = ("revision", "quantization_config")


@dataclass(frozen=True)
class Trained:
    """What a run folder says of how its model came about.

    Args:
        folder: the run folder.
        model: name of the policy's source; None where the run was started from Python and says nothing of it.
        args: the run's configuration, without what belongs to machine and schedule; None as above.
        algorithm: what trained; None as above.
        reference_model: name of the other model that was the reference; None for none.
        identity: of the reference; None where there is no record.
        moves: how often the reference had moved.
        tensors: file with the values of a reference that had moved; None where no checkpoint holds them.
        conversational: whether its rows were conversations; None where that is not known.
        rows: fingerprint of the prepared rows that it was trained on; None where that is not known.
    """

    folder: Path
    model: str | None = None
    args: PreferenceConfig | None = None
    algorithm: type[Algorithm[Any]] | None = None
    reference_model: str | None = None
    identity: ReferenceIdentity | None = None
    moves: int = 0
    tensors: Path | None = None
    conversational: bool | None = None
    rows: str | None = None

    @property
    def is_reward_model(self) -> bool:
        """Whether it trained rewards of whole completions."""
        return self.algorithm is not None and issubclass(self.algorithm, Reward)


@dataclass(frozen=True)
class NamedModel:
    """A model as it was named on the command line; `tether.config.named_model` makes one.

    Args:
        name: as it was given.
        source: hub name, `.gguf` file, or folder with the weights or the adapter.
        role: the policy that is there, or the reference that it was trained against.
        trained: what its run folder says; None for a model without one.
        dtype: of the weights that was asked for; None: as it was trained, or as `load_policy` decides.
        base: of an adapter, in place of the one that its folder names.
    """

    name: str
    source: str
    role: Literal["policy", "reference"] = "policy"
    trained: Trained | None = None
    dtype: str | None = None
    base: str | None = None

    @property
    def classifies(self) -> bool:
        """Whether it gives rewards and no log-probabilities."""
        if self.trained is not None and self.trained.is_reward_model:
            return self.role == "policy"
        return is_classifier(self.source)

    def load(self, beside: Loaded | None = None) -> Loaded:
        """Load it, on the accelerator where there is one.

        Args:
            beside: a model that is loaded already; a reference that is this one with its adapter off shares it.

        Raises:
            ConfigError: it cannot be loaded, or the run had no reference.
            ReferencePolicyError: the reference had moved, and where it stood is not known.
        """
        if self.role == "policy":
            return self._policy()
        return _Reference(self, cast(Trained, self.trained)).load(beside)

    def options(self) -> dict[str, Any]:
        """Keywords to load a base or a whole model with, as its run did."""
        run = self.trained
        options: dict[str, Any] = {}
        if run is not None and run.args is not None and run.model is not None:
            options = policy_spec(run.model, run.args).options()
        recorded = run.identity.dtype if run is not None and run.identity is not None else None
        recorded = recorded if recorded in DTYPES else None
        by_run = options.get("dtype") if options.get("dtype") != "auto" else None
        return {**options, "dtype": self.dtype or by_run or recorded or "auto"}

    def base_source(self) -> tuple[str, str | None]:
        """Name and revision of the base under an adapter's folder.

        Raises:
            ConfigError: the folder names none, or it is gone.
        """
        config = adapter_config(self.source)
        if self.base is not None:
            return self.base, None
        name = config.base_model_name_or_path
        if not name:
            raise ConfigError(
                f"The adapter '{self.source}' does not say which model it belongs to: it was trained on a model in "
                "memory. Fill 'base_model_name_or_path' in its adapter_config.json."
            )
        try:
            check_source(name)
        except ConfigError as error:
            raise ConfigError(
                f"The base of the adapter '{self.source}' is '{name}', which cannot be loaded: {error} Put it back, or "
                "correct 'base_model_name_or_path' in adapter_config.json."
            ) from error
        return name, config.revision

    def load_base(self) -> nn.Module:
        """The base under an adapter's folder, as the run loaded it."""
        source, revision = self.base_source()
        return self._loader()(source, **{**self.options(), "revision": revision})

    def load_weights(self) -> nn.Module:
        """The model of the folder, its adapters active, on the CPU unless the run placed it elsewhere."""
        if is_adapter(self.source):
            return continue_adapter(cast(PreTrainedModel, self.load_base()), self.source)
        options = {key: value for key, value in self.options().items() if key not in _OF_THE_SOURCE}
        return self._loader()(self.source, **options)

    def _loader(self) -> Callable[..., nn.Module]:
        return load_reward_model if self.classifies else load_policy

    def _policy(self) -> Loaded:
        model = placed(self.load_weights())
        processing = load_processing(self.source)
        if self.classifies:
            model.config.get_text_config().pad_token_id = text_tokenizer(processing).pad_token_id  # type: ignore
        return Loaded(self, model, processing)


@dataclass(frozen=True)
class Loaded:
    """A model that was named, with what reads and writes text for it.

    Args:
        named: what it was named as.
        model: the weights; a reference may share them with its policy.
        processing: tokenizer or processor.
        around: within it the model computes as what was named.
        proved: whether its weights have the hash that the run recorded; None where there is nothing to compare.
    """

    named: NamedModel
    model: nn.Module
    processing: Any
    around: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext, repr=False)
    proved: bool | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, out of a processor where there is one."""
        return text_tokenizer(self.processing)

    @contextmanager
    def in_effect(self) -> Iterator[nn.Module]:
        """Inside, the model computes as what was named, in evaluation mode and without gradients."""
        with self.around(), frozen_pass(self.model):
            yield self.model


@dataclass(frozen=True)
class _Reference:
    """How the reference of a run is had again."""

    named: NamedModel
    run: Trained

    def load(self, beside: Loaded | None) -> Loaded:
        identity = self._identity()
        if identity.meaning == "none":
            raise ConfigError(
                f"'{self.named.name}': the run {self.run.folder} was trained without a reference. Name another model."
            )
        policy = replace(self.named, name=str(self.run.folder), role="policy")
        if identity.sync is not None:
            return self._moved(policy)
        if identity.method == "adapter_off" and is_adapter(self.named.source):
            shares = beside is not None and beside.named.source == self.named.source
            under = beside if beside is not None and shares else policy.load()
            off = partial(adapters_off, under.model)
            proved = self._proved(under.model)
            return Loaded(self.named, under.model, under.processing, off, proved)
        model, tokenizer = self._alone(identity)
        proved = None if adapter_configs(model) or self._new_tokens() else self._proved(model)
        return Loaded(self.named, placed(model), tokenizer, proved=proved)

    def _identity(self) -> ReferenceIdentity:
        if self.run.identity is None:
            raise ConfigError(
                f"'{self.named.name}': {self.run.folder} has no reference.json, so what it was trained against is not "
                "known. Name the other model itself."
            )
        return self.run.identity

    def _alone(self, identity: ReferenceIdentity) -> tuple[nn.Module, Any]:
        """The reference as a model of its own."""
        run, dtype = self.run, self.named.dtype or identity.dtype
        if identity.meaning == "model" and (identity.method == "remote" or identity.source == _IN_MEMORY):
            where = "a server's" if identity.method == "remote" else "made in memory"
            raise ConfigError(
                f"'{self.named.name}': the reference of {run.folder} was {where}, which is not here. Name a model that "
                "is the same."
            )
        if identity.meaning == "adapter":
            return load_policy(identity.source, dtype=dtype), load_processing(identity.source)
        if run.args is None or run.model is None:
            if identity.source == _IN_MEMORY:
                raise ConfigError(
                    f"'{self.named.name}': the run {run.folder} began from a model in memory, which was not saved. "
                    "Name a model that is the same."
                )
            return load_policy(identity.source, revision=identity.revision, dtype=dtype), self._processing()
        if identity.meaning == "model":
            spec = reference_model_spec(run.args, cast(str, run.reference_model))
            return replace(spec, dtype=dtype).load(), load_processing(spec.tokenizer or spec.source)
        spec = replace(policy_spec(run.model, run.args), dtype=dtype)
        tokenizer, new_tokens = processing_of(run.model, run.args)
        model = spec.load() if identity.meaning == "start" else _without_adapter(spec)
        embed_tokens(model, new_tokens)
        return model, tokenizer

    def _moved(self, policy: NamedModel) -> Loaded:
        """A reference that moved: the tensors of the checkpoint, in the model that they were kept of."""
        identity, place = self._identity(), self.run.tensors
        if place is None:
            raise ReferencePolicyError(
                f"The reference of {self.run.folder} moves {identity.sync}, and no checkpoint of the last step holds "
                f"where it stood. Name a checkpoint: {self.run.folder}/checkpoint-N, or another --reference."
            )
        if not self.run.moves:
            model, processing = self._alone(identity)
            return Loaded(self.named, placed(model), processing)
        if identity.meaning == "model":
            model, processing = self._alone(identity)
        else:
            model, processing = policy.load_weights(), self._processing()
        ours = dict(model.named_parameters())
        tensors = load_file(place)
        if not tensors.keys() <= ours.keys():
            raise ReferencePolicyError(f"{place} holds tensors that the model of {self.run.folder} does not have.")
        with torch.no_grad():
            for name, value in tensors.items():
                ours[name].copy_(value)
        return Loaded(self.named, placed(model), processing)

    def _processing(self) -> Any:
        return load_processing(self.named.source)

    def _new_tokens(self) -> bool:
        return self.run.args is not None and bool(self.run.args.add_tokens)

    def _proved(self, model: nn.Module) -> bool | None:
        """Whether the weights have the recorded hash, with a warning where they do not."""
        identity = self._identity()
        if str(dtype_of(model)).removeprefix("torch.") != identity.dtype or self._new_tokens():
            return None
        found = model_fingerprint(model, without_adapters=True)
        if found == identity.fingerprint:
            logger.info(f"reference: {identity.meaning} of {self.run.folder}, {found}, as it was trained against")
            return True
        if identity.method == "snapshot" and is_adapter(self.named.source):
            # The hash may be of the start with its adapter, which then was no zero (PiSSA, virtual tokens).
            return None
        logger.warning(
            f"reference: '{identity.source}' is {found} now, and {self.run.folder} was trained against "
            f"{identity.fingerprint}: the weights or the libraries changed since, so what follows is not of that model"
        )
        return False


_IN_MEMORY = "object in memory"


def _without_adapter(spec: ModelSpec) -> nn.Module:
    """The base of a policy that is named, whatever adapter its name leads to."""
    model = spec.load_base()
    return cast(PeftModel, model).unload() if adapter_configs(model) else model


def placed(model: nn.Module) -> nn.Module:
    """The model on the accelerator, where there is one and it is not placed already."""
    accelerator = torch.accelerator.current_accelerator()
    return model.to(accelerator) if accelerator is not None and may_move(model) else model
