"""Places of torch that it does not document; read in torch 2.13.0."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves as _tree_leaves

from tether.compat.launcher import number

# What every dropout layer derives from (plain, by channel, alpha); torch exports only the layers themselves.
DropoutLayer = _DropoutNd
# Sees every operation that runs inside it, backward included, and what it returns; and what there is in nested values.
DispatchMode, tree_leaves = TorchDispatchMode, _tree_leaves
# What `checkpoint_wrapper` and `torch.compile` put before the names of what they wrap.
WRAPPER_NAMES = ("_checkpoint_wrapped_module.", "_orig_mod.")


# All that torch's writer puts into the metadata of a sharded checkpoint; its reader takes whatever a pickle names.
_OF_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}


class _MetadataReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        of_torch = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout))
        if name in _OF_METADATA.get(module, ()) or of_torch:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def foreign_metadata(path: Path) -> str:
    """What the metadata of a sharded checkpoint holds that torch's writer does not write; empty for nothing.

    Torch's reader would run it. Nothing is run here: only the classes of metadata are made.
    """
    try:
        with path.open("rb") as file:
            _MetadataReader(file).load()
    except Exception as error:  # a damaged pickle raises errors of any kind
        return str(error) or type(error).__name__
    return ""


def launcher_store(seconds: float) -> Any:
    """A connection to the store where the processes of a launched run meet; an answer may take so many seconds.

    torch exports the class without a name that type checkers see.
    """
    host, port = os.environ["MASTER_ADDR"], number("MASTER_PORT", 0)
    limit = timedelta(seconds=seconds)
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)  # type: ignore


def has_onednn() -> bool:
    """Whether this build of torch offers oneDNN's float32 products, see `onednn_linear`."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`inputs @ weight.T + bias` by oneDNN: the operator that torch's own compiler puts in the place of linear layers.

    Torch has no other way to ask for oneDNN's float32 products where it was built with MKL. No derivative.
    """
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Gradient by the scores, from the one by `weights`, their softmax over the last dimension.

    The operator that autograd calls; written out it would make two more tensors of the size of the scores.
    """
    return torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether anyone has hooked a module's forward; torch can add and remove such hooks, and not list them."""
    return bool(module._forward_hooks)


def compiled_module(model: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` has wrapped; None for any other model."""
    return getattr(model, "_orig_mod", None)


def class_under_fsdp(module: FSDPModule) -> type:
    """The class that a module had before `fully_shard`, which puts a class of its own over it, first `FSDPModule`."""
    return type(module).__bases__[1]


def end_forward(root: FSDPModule) -> None:
    """End what is left of FSDP2's forward, of a module called alone after it; before the first, there is no root yet.

    `reshard` frees what is gathered, and leaves the states of a forward that was not followed by a backward.
    """
    if root._get_fsdp_state()._is_root:  # type: ignore[attr-defined]
        root.reset_iter_state()  # type: ignore[attr-defined]


@contextmanager
def kept_after_forward(modules: Sequence[FSDPModule]) -> Iterator[None]:
    """Inside, FSDP2 keeps what it has gathered after any number of forwards without gradient.

    `set_reshard_after_forward` does the same and cannot say what was set before. The first of the modules is the outer
    one: torch takes the module whose forward comes first for the outer one, and `generate` calls one that lies inside.
    """
    modules[0]._get_fsdp_state()._lazy_init()  # type: ignore[attr-defined]
    groups = [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]  # type: ignore
    before = [group.post_forward_mesh_info for group in groups]
    for group in groups:
        group.post_forward_mesh_info = None
    try:
        yield
    finally:
        for group, info in zip(groups, before, strict=True):
            group.post_forward_mesh_info = info


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """What a tensor of a class of its own is made of, such as quantised values and their scales; none for a plain one.

    `__tensor_flatten__` is how torch's compiler takes such tensors apart.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return []
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [getattr(tensor, name) for name in names]


def without_values() -> FakeTensorMode:
    """A context in which tensors have shape, type and device, and no values; real ones that meet them lose theirs.

    Unlike the device `meta` they are said to be on a CPU, so that autocast and what asks for a device answer as there.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def has_no_values(tensor: Tensor) -> bool:
    """Whether a tensor was made inside `without_values`."""
    return isinstance(tensor, FakeTensor)


def with_values() -> Any:
    """A context in which tensors have values, also inside `without_values`: for what is kept and used again later."""
    return _disable_current_modes()


def memory_address(memory: UntypedStorage) -> int:
    """What tells one memory from another, also where it has no bytes: the handle of torch's own object."""
    return memory._cdata


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """What `state_dict` gives, without its hooks: those of FSDP2 put a module that is gathered back into shards
    (torch 2.13). Which buffers are kept is said in private places alone."""
    found: dict[str, Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        kept = {name: value for name, value in part._buffers.items() if name not in part._non_persistent_buffers_set}
        for name, value in {**part._parameters, **kept}.items():
            if value is not None:
                found[f"{path}.{name}" if path else name] = value.detach()
    return found
