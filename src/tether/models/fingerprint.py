"""Fingerprint of weights: says whether two models, or one model at two times, are the same policy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.compat.deepspeed import is_partitioned
from tether.compat.peft import ADDED, is_original
from tether.compat.torch import inner_tensors
from tether.compat.transformers import PRIVATE_CONFIG
from tether.errors import ReferencePolicyError
from tether.models.structure import adapter_configs, transformers_model, unwrap

THREADS = max(2, min(16, os.cpu_count() or 2))
CHUNK = 1 << 24
_DIGEST_BYTES = 20
# Name, dtype, shape, and what gives the hash of the values.
Entry = tuple[str, str, list[int], Callable[[], bytes]]
# What may differ between two copies of one policy: where it came from, how it is run, what generation and training
# do with it. Token ids are here because trainers fill in the missing ones.
_VOLATILE_CONFIG = {
    *PRIVATE_CONFIG,
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "experts_implementation",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}
_VOLATILE_ADAPTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}


def fingerprint(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], *, extra: bytes = b"") -> str:
    """Content hash of named tensors: `b2:` and 40 hexadecimal digits (BLAKE2b, 160 bits).

    It depends on each tensor's name, shape, dtype and values, and on `extra`; not on the order of the tensors, their
    device or their strides. The tensors are read in place, a chunk at a time.

    Args:
        tensors: name to tensor of any shape, or pairs of them.
        extra: more bytes that belong to the identity.

    Returns:
        The hash.

    Raises:
        ReferencePolicyError: a name comes twice, or a tensor has no values here (sharded over ranks, or on `meta`).

    Example:
        >>> a = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.zeros(2)}
        >>> b = [("b", torch.zeros(2)), ("w", torch.tensor([[1.0, 3.0], [2.0, 4.0]]).T)]
        >>> fingerprint(a) == fingerprint(b), fingerprint(a) == fingerprint(a, extra=b"other")
        (True, False)
    """
    listed = tensors.items() if isinstance(tensors, Mapping) else tensors
    pairs = sorted(cast(Iterable[tuple[str, Tensor]], listed), key=lambda pair: pair[0])
    seen: set[str] = set()
    for name, tensor in pairs:
        _check_readable(name, tensor)
        if name in seen:
            raise ReferencePolicyError(f"Two tensors are named '{name}'. Names must be unique to identify a model.")
        seen.add(name)
    entries = [(name, str(tensor.dtype), list(tensor.shape), partial(digest_of, tensor)) for name, tensor in pairs]
    return combined(entries, [tensor.nbytes for _, tensor in pairs], extra)


def combined(entries: list[Entry], sizes: list[int], extra: bytes) -> str:
    """The fingerprint of tensors that are hashed here, side by side; hashlib releases the interpreter lock.

    Args:
        entries: name, dtype and shape of each tensor in the order of names, and what gives the hash of its values.
        sizes: bytes of each; the largest begin first, so that none is left for the end.
        extra: more bytes that belong to the identity.
    """
    order = sorted(range(len(entries)), key=lambda i: -sizes[i])
    with ThreadPoolExecutor(THREADS) as pool:
        running = {i: pool.submit(entries[i][3]) for i in order}
        digests = [running[i].result() for i in range(len(entries))]
    total = blake2b(digest_size=_DIGEST_BYTES)
    for (name, dtype, shape, _), digest in zip(entries, digests, strict=True):
        entry = json.dumps([name, dtype, shape]).encode()
        total.update(len(entry).to_bytes(8, "little") + entry + digest)
    total.update(b"extra" + extra)
    return f"b2:{total.hexdigest()}"


def model_fingerprint(model: nn.Module, *, without_adapters: bool) -> str:
    """Fingerprint of a policy: its weights, and what of its configuration decides the computation.

    A weight under several names (tied embeddings) counts once. Where the model came from, attention implementation,
    generation settings and training mode do not matter; the dtype of the weights does.

    Args:
        model: a transformers model or a PEFT model around one, also inside wrappers that do not shard it.
        without_adapters: hash the model under the adapters, under the names its tensors have without PEFT. A PEFT
            model then gives the fingerprint of the plain model it wraps.

    Returns:
        The hash, see `fingerprint`.

    Raises:
        ConfigError: not a transformers model.
        ReferencePolicyError: the weights are sharded or on `meta`.
    """
    identity = computation(transformers_model(model))
    tensors = base_tensors(model)
    inner = unwrap(model)
    configs = adapter_configs(inner)
    if configs and not without_adapters:
        under = {id(tensor) for tensor in tensors.values()}
        added = {f"adapter:{name}": tensor for name, tensor in _state(inner) if id(tensor) not in under}
        tensors = {**tensors, **added}
        identity["adapters"] = {
            name: _plain({key: value for key, value in config.to_dict().items() if key not in _VOLATILE_ADAPTER})
            for name, config in configs.items()
        }
        identity["active"] = inner.active_adapters if isinstance(inner, PeftModel) else inner.active_adapters()
    return fingerprint(tensors, extra=as_bytes(identity))


def computation(base: PreTrainedModel) -> dict[str, Any]:
    """What, besides the weights, decides what a model without adapters computes."""
    return {"class": type(base).__name__, "config": _steady(base.config.to_diff_dict())}


def as_bytes(identity: dict[str, Any]) -> bytes:
    """An identity as `fingerprint` takes it in `extra`."""
    return json.dumps(identity, sort_keys=True, default=str).encode()


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors under all adapters, by the names that the model has without PEFT.

    Args:
        model: a transformers model or a PEFT model around one.

    Returns:
        Name to parameter or saved buffer. A tensor with several names is listed once, under the first in order.
    """
    base = transformers_model(model)
    names: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in _state(base):
        plain = _name_without_adapters(base, name)
        if plain is not None and (id(tensor) not in names or plain < names[id(tensor)][0]):
            names[id(tensor)] = (plain, tensor)
    return dict(names.values())


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # keep_vars leaves the parameters themselves in the dictionary, so that tied ones are seen to be one object.
    # The state dictionary also has what quantised layers keep beside their weights.
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            yield name, value


def _name_without_adapters(model: nn.Module, name: str) -> str | None:
    """The tensor's name before PEFT put layers around layers; None for what PEFT added."""
    module: Any = model
    kept = []
    for part in name.split("."):
        if not isinstance(module, ADDED):
            kept.append(part)
        elif not is_original(module, part):
            return None
        module = getattr(module, part, None)
    return ".".join(kept)


def _steady(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _steady(value) if isinstance(value, dict) else _plain(value)
        for key, value in config.items()
        # Dropout is off whenever a reference is scored.
        if key not in _VOLATILE_CONFIG and "dropout" not in key and not key.endswith("pdrop")
    }


def _plain(value: Any) -> Any:
    """The same value without sets, whose order changes from process to process."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _check_readable(name: str, tensor: Tensor) -> None:
    away = is_partitioned(tensor) and not tensor.numel()
    if tensor.is_meta or hasattr(tensor, "full_tensor") or away:
        where = "on the device 'meta'" if tensor.is_meta else "sharded over several processes"
        raise ReferencePolicyError(
            f"The tensor '{name}' is {where}, so its values cannot be hashed here. Take the fingerprint of a model "
            "that is loaded as a whole, before it is sharded or offloaded."
        )


def digest_of(tensor: Tensor) -> bytes:
    """Hash of a tensor's values."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for chunk in _chunks(tensor.detach()):
        digest.update(chunk.cpu().view(torch.uint8).numpy().data)
    return digest.digest()


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The values in order, as contiguous vectors of at most about `CHUNK` bytes; only scattered ones are copied."""
    if parts := inner_tensors(tensor):
        for part in parts:
            yield from _chunks(part)
        return
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(max(1, CHUNK // tensor.element_size()))
        return
    rows = max(1, CHUNK * len(tensor) // (tensor.numel() * tensor.element_size()))
    for part in tensor.split(rows):
        yield part.contiguous().view(-1)
