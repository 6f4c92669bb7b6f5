"""A second model that moves (TR-DPO): it starts where it was loaded and is drawn towards the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tether.compat.peft import ADDED, layer_under, merged_layer
from tether.compat.transformers import is_quantized
from tether.errors import ReferencePolicyError
from tether.models.fingerprint import computation
from tether.models.structure import transformers_model, unwrap
from tether.reference.base import Scorer
from tether.reference.methods.model import ModelReference
from tether.reference.methods.shards import gather_shards, local_part, plain_name
from tether.reference.spec import Sync
from tether.types import ReferenceIdentity

# How long a row may be; where that is more than a limit, the shape of a tensor says so.
_LIMITS = {"max_position_embeddings", "n_positions"}


class MovingModelReference(ModelReference):
    """Another model of the policy's architecture, moved towards the policy tensor by tensor.

    What moves it is what the policy computes with: for a policy with an adapter, its weights with the adapter merged.

    Args:
        policy: the model in training.
        model: the weights that the reference begins with; they are changed in place.
        scorer: the scoring function in the model's layout.
        identity: what this reference is, and how it moves.
        sync: when and how far.

    Raises:
        ReferencePolicyError: a model that cannot be mixed with the policy.
    """

    def __init__(
        self, policy: nn.Module, model: nn.Module, scorer: Scorer, identity: ReferenceIdentity, sync: Sync
    ) -> None:
        refuse_unmixable(policy, model)
        super().__init__(model, scorer, identity)
        self._policy, self.sync = policy, sync

    def move(self, alpha: float) -> None:
        """Make the reference `alpha * policy + (1 - alpha) * reference`, tensor by tensor.

        Args:
            alpha: the policy's share; 1 makes the reference compute what the policy computes now.
        """
        ours = self._tensors()
        with torch.no_grad():
            for name, value in policy_weights(self._policy):
                _mix(ours[name], value, alpha)
        self.moves += 1

    def place(self, put: Callable[[nn.Module], nn.Module]) -> None:
        """It stays whole: the policy's tensors are mixed into it whole."""

    def state(self) -> dict[str, Tensor]:
        """The moved weights, whole; nothing before the first move, when they are those of the source."""
        return {name: _whole(tensor) for name, tensor in self._tensors().items()} if self.moves else {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take values from a checkpoint.

        Raises:
            ReferencePolicyError: names or shapes are not those of this model.
        """
        ours = self._tensors()
        odd = _difference(ours, tensors)
        if odd:
            raise ReferencePolicyError(
                f"The checkpoint's moved reference does not fit the model {self.identity.source!r}: {odd}. Resume "
                "with the same reference model."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                ours[name].copy_(tensor)

    def _tensors(self) -> dict[str, Tensor]:
        return _parameters(self._recalled())


def refuse_unmixable(policy: nn.Module, model: nn.Module) -> None:
    """Refuse a model whose weights cannot be mixed with the policy's; nothing is computed.

    Raises:
        ReferencePolicyError: an adapter on it, quantised weights, another architecture or other tensors, or an adapter
            of the policy on weights that are tied.
    """
    theirs, ours = unwrap(model), unwrap(policy)
    if isinstance(theirs, PeftModel):
        raise ReferencePolicyError(
            "sync was asked for with a reference that has an adapter of its own, whose factors are not the policy's "
            "and cannot be mixed with them. Merge it (merge_and_unload) and give the merged model."
        )
    for whose, one in (("reference", theirs), ("policy", transformers_model(policy))):
        if is_quantized(one):
            raise ReferencePolicyError(
                f"sync was asked for with a quantised {whose}, whose weights cannot be mixed. Leave its quantisation "
                "out, or use reference: start, where the adapter alone moves."
            )
    odd = _other_function(transformers_model(policy), theirs) or _difference(
        _parameters(theirs), dict(policy_weights(policy, merge=False))
    )
    if odd:
        raise ReferencePolicyError(
            f"sync was asked for with a reference model that is no copy of the policy's architecture: {odd}. A "
            "moving reference needs the same tensors on both sides; use such a model, or turn sync off."
        )
    tied = _tied_under_adapter(ours)
    if tied:
        raise ReferencePolicyError(
            f"sync was asked for with a separate reference model and an adapter on {tied!r}, whose weight is tied to "
            "another layer's, so that no plain model computes what the policy does. Leave that layer out of the "
            "adapter, or use reference: start."
        )


def policy_weights(policy: nn.Module, *, merge: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The weights that a policy computes with, by the names of the model without adapters; tied ones once.

    Args:
        policy: a transformers model or a PEFT model around one.
        merge: with adapters merged, one layer at a time, so that no second model is made; else what is under them.

    Yields:
        Name and value.
    """
    base, seen = transformers_model(policy), set()
    added = {path: module for path, module in base.named_modules() if isinstance(module, ADDED)}
    outermost = {path for path in added if not any(path.startswith(f"{other}.") for other in added)}
    for name, parameter in base.named_parameters():
        if not any(name.startswith(f"{path}.") for path in outermost):
            seen.add(id(parameter))
            yield plain_name(name), parameter.detach()
    for path in outermost:
        layer = merged_layer(added[path]) if merge else layer_under(added[path])
        for name, parameter in layer.named_parameters():
            if id(parameter) not in seen:
                yield plain_name(f"{path}.{name}"), parameter.detach()


def _tied_under_adapter(policy: nn.Module) -> str:
    """Path of a layer with an adapter, one of whose weights belongs to another layer too; empty for none."""
    owners: dict[int, set[str]] = {}
    base = transformers_model(policy)
    added = {path: module for path, module in base.named_modules() if isinstance(module, ADDED)}
    for path, module in base.named_modules():
        for parameter in module.parameters(recurse=False):
            inside = [outer for outer in added if f"{path}.".startswith(f"{outer}.")]
            owners.setdefault(id(parameter), set()).add(min(inside, key=len) if inside else path)
    shared = [paths for paths in owners.values() if len(paths) > 1]
    return next((path for paths in shared for path in sorted(paths) if path in added), "")


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): parameter.detach() for name, parameter in unwrap(model).named_parameters()}


def _other_function(policy: nn.Module, model: nn.Module) -> str:
    """In what the configurations differ that decide the computation, in words; empty for nothing."""
    ours, theirs = computation(transformers_model(policy)), computation(transformers_model(model))
    if ours["class"] != theirs["class"]:
        return f"it is a {theirs['class']} and the policy a {ours['class']}"
    # Entries that the architecture does not know, such as another program's notes, change nothing.
    known = type(transformers_model(policy).config)().to_dict().keys() - _LIMITS
    mine, its = ours["config"], theirs["config"]
    odd = sorted(key for key in (mine.keys() | its.keys()) & known if mine.get(key) != its.get(key))
    return f"{odd[0]} is {its.get(odd[0])} there and {mine.get(odd[0])} in the policy" if odd else ""


def _difference(reference: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    """Which tensors differ in name or shape, in words; empty for none."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (reference, other)]
    odd = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
    if not odd:
        return ""
    sizes = [str(shape.get(odd[0], "absent")) for shape in shapes]
    return f"{len(odd)} tensors differ, such as {odd[0]!r}, which is {sizes[0]} in the reference and {sizes[1]} in it"


def _mix(kept: Tensor, value: Tensor, alpha: float) -> None:
    """`alpha * value + (1 - alpha) * kept`, in place, in float32 where one of them is shorter."""
    if isinstance(kept, DTensor) and isinstance(value, DTensor) and kept.placements == value.placements:
        kept, value = local_part(kept), local_part(value)
    value = _whole(value).to(kept.device)
    if kept.dtype == value.dtype == torch.float32:
        kept.mul_(1.0 - alpha).add_(value, alpha=alpha)
    else:
        kept.copy_(kept.float().mul_(1.0 - alpha).add_(value.float(), alpha=alpha))


def _whole(tensor: Tensor) -> Tensor:
    """All values; a collective operation for a tensor in shards."""
    return gather_shards(local_part(tensor), tensor)
