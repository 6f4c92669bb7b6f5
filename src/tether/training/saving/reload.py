"""The proof at the end: the model that is loaded from the folder is the one in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.compute.cpu_matmul import compute_by_products
from tether.compute.memory import LOADING_ROOM, give_back, room_for_another
from tether.errors import ConfigError, TetherError
from tether.models.adapters import continue_adapter
from tether.models.adapting.adapter_files import adapter_config
from tether.models.adapting.base_rewriting import is_rewritten
from tether.models.load import is_adapter
from tether.models.spec import ModelSpec
from tether.models.structure import dtype_of, transformers_model, unwrap
from tether.reference.base import frozen_pass
from tether.reference.guard import largest_difference
from tether.reference.methods.model import may_move
from tether.scoring import pack
from tether.training.config import PreferenceConfig
from tether.types import ScoringBatch

_ROWS = 4
# Nats; the same kernels over the same weights differ by nothing, in any type.
_SAME = 1e-4
# Keywords for loading that belong to the policy's source and not to what is saved of it.
_OF_THE_SOURCE = ("revision",)


class ReloadProof:
    """Loads what was saved and scores a few rows with it.

    It is not done, and the line says so, where the weights are in shards, where a second model does not fit into the
    memory beside the first, or where nothing names the base of an adapter.

    Args:
        args: of the run, for how models are loaded.
        load: loads a policy, whole, by name; with the keywords of `load_policy`.
        scorer: model and batch to scores, as the run scores.
        probe: rows of the run.
        rounding: nats by which two sums of the same may differ in the precision of the scorer.
    """

    def __init__(
        self,
        args: PreferenceConfig,
        load: Callable[..., nn.Module],
        scorer: Callable[..., Any],
        probe: ScoringBatch,
        rounding: float,
    ) -> None:
        self._args, self._load, self._scorer, self._rounding = args, load, scorer, rounding
        self._rows = pack(probe.examples[:_ROWS])

    def check(self, policy: nn.Module, folder: Path, reason: str = "") -> str:
        """Compare the model in a folder with the one in memory.

        Args:
            policy: in memory, whole.
            folder: that it was saved in.
            reason: why it cannot be, if that is known.

        Returns:
            What was found, or why nothing could be looked at, in a line.

        Raises:
            TetherError: they are different models, or the folder cannot be loaded.
        """
        give_back()
        place, reason = _place(policy, folder), reason or _no_room(policy)
        with torch.random.fork_rng(devices=[]):  # a random head that is loaded over
            base = None if reason else self._base(policy, place)
            if isinstance(base, str):
                reason, base = base, None
            if reason:
                return f"not loaded again for comparison, as {reason}"
            again = self._whole(base, policy, place)
        device = next(policy.parameters()).device
        if may_move(again):
            again.to(device)
        _in_types_of(policy, again)
        rows = self._rows.to(device)
        difference = largest_difference(_values(self._scorer, again, rows), _values(self._scorer, policy, rows))
        words = (
            f"{rows.num_examples} rows scored by the model as it is loaded, at most {difference:.1e} nats from memory"
        )
        # Of a base that was rewritten, what is loaded is another sum of the same, rounded otherwise.
        limit = max(_SAME, self._rounding) if is_rewritten(policy) else _SAME
        if not difference <= limit:
            raise TetherError(
                f"What was saved in {folder} is another model than the one in memory: {words} (allowed {limit:.0e}). "
                f"{_why(policy, again)}The model in memory is whole; save it with its own save_pretrained once the "
                "cause is known."
            )
        return f"{words} (allowed {limit:.0e})"

    def _options(self, policy: nn.Module) -> dict[str, Any]:
        given = cast(dict[str, Any], self._args.model_init_kwargs or {})
        kept = {name: value for name, value in given.items() if name not in _OF_THE_SOURCE}
        options = ModelSpec.of(".", kept, trust_remote_code=self._args.trust_remote_code).options()
        quantization = getattr(transformers_model(policy).config, "quantization_config", None)
        if quantization is not None:
            options.setdefault("quantization_config", quantization)
        return {**options, "dtype": dtype_of(policy)}

    def _base(self, policy: nn.Module, place: Path) -> nn.Module | str | None:
        """The base of an adapter's folder, why it cannot be had, or None for a folder that is whole."""
        if not isinstance(unwrap(policy), PeftModel):
            return None
        if not is_adapter(place):
            return "no adapter lies in the folder itself: several have names of their own"
        config = adapter_config(place)
        if not config.base_model_name_or_path:
            return "the base of the adapter was made in memory and has no name"
        try:
            options = {**self._options(policy), "revision": config.revision}
            return self._load(config.base_model_name_or_path, **options)
        except ConfigError as error:
            return f"the adapter's base cannot be loaded, neither by whoever uses the folder: {error}"

    def _whole(self, base: nn.Module | None, policy: nn.Module, place: Path) -> nn.Module:
        try:
            if base is not None:
                return continue_adapter(cast(PreTrainedModel, base), place)
            options = {name: value for name, value in self._options(policy).items() if name != "quantization_config"}
            return self._load(str(place), **options)
        except ConfigError as error:
            raise TetherError(f"What was saved in {place} cannot be loaded again: {error}") from error


def _place(policy: nn.Module, folder: Path) -> Path:
    inner = unwrap(policy)
    if not isinstance(inner, PeftModel) or is_adapter(folder) or len(inner.active_adapters) != 1:
        return folder
    return folder / inner.active_adapters[0]


def _no_room(policy: nn.Module) -> str:
    """Why no second model can be made; empty where one can."""
    devices = {parameter.device for parameter in policy.parameters()}
    if len(devices) > 1:
        return "the model is spread over devices"
    need = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())
    room = room_for_another(devices.pop())
    if need * LOADING_ROOM > room:
        return f"it needs {need * LOADING_ROOM / 2**30:.1f} GiB, and {max(room, 0) / 2**30:.1f} GiB are free"
    return ""


def _in_types_of(policy: nn.Module, again: nn.Module) -> None:
    """Compute with the tensors that were loaded in the types of those in memory: PEFT loads an adapter in float32,
    whatever it was trained in. Nothing that was lost in saving comes back by it."""
    types = {name: parameter.dtype for name, parameter in unwrap(policy).named_parameters()}
    for name, parameter in unwrap(again).named_parameters():
        if types.get(name, parameter.dtype) != parameter.dtype:
            parameter.data = parameter.data.to(types[name])


def _values(scorer: Callable[..., Any], model: nn.Module, rows: ScoringBatch) -> Tensor:
    compute_by_products(model)
    with frozen_pass(model):
        scores = scorer(model, rows)
    return scores if isinstance(scores, Tensor) else scores.token_logps


def _why(policy: nn.Module, again: nn.Module) -> str:
    """Which tensors differ, in words; empty where the two are made of other tensors."""
    mine, theirs = dict(unwrap(policy).named_parameters()), dict(unwrap(again).named_parameters())
    gaps = {
        name: (tensor.detach().float() - theirs[name].detach().float()).abs().max().item()
        for name, tensor in mine.items()
        if name in theirs and theirs[name].shape == tensor.shape and tensor.numel()
    }
    different = sorted((name for name, gap in gaps.items() if not gap <= 1e-6), key=lambda name: -gaps[name])
    if not different:
        return "No tensor that both have differs: the two compute something else with them. "
    return (
        f"{len(different)} tensors differ, most {different[0]!r}, by {gaps[different[0]]:.2g}: was the base changed in "
        "memory after it was loaded? "
    )
