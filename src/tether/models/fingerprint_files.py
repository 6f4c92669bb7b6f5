"""Fingerprint of a checkpoint on disk, without loading the model: the same as of the model that it would give."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tether.compat.transformers import kept_in_float32
from tether.errors import ReferencePolicyError
from tether.models.fingerprint import Entry, as_bytes, base_tensors, combined, computation, digest_of

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def checkpoint_fingerprint(folder: str | Path, *, dtype: torch.dtype | None = None) -> str:
    """Fingerprint of the safetensors files of a causal language model, tensor by tensor.

    It does not depend on how the weights are split into files, and equals `model_fingerprint` of the loaded model.

    Args:
        folder: of the checkpoint, with `config.json`; not an adapter's.
        dtype: type that the weights would be loaded in; None for the one that they are saved in.

    Returns:
        The hash, see `tether.models.fingerprint`.

    Raises:
        ReferencePolicyError: there are no such files, or transformers changes the tensors when it loads them (other
            names, quantisation, parts kept in float32), so that the files do not say what the model will be.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ReferencePolicyError(
            f"{folder} has no config.json; name the folder of a model, not an adapter or a file."
        )
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    _refuse_changes(folder, model, dtype)
    places, sources = _places(folder), _sources(model)
    entries: list[Entry] = []
    sizes: list[int] = []
    for name in sorted(sources):
        saved = next((alias for alias in sources[name] if alias in places), None)
        if saved is None:
            raise ReferencePolicyError(
                f"The model has a tensor '{name}' that the files in {folder} do not name, so transformers would rename "
                "or make it. Load the model and take `model_fingerprint`."
            )
        with safe_open(places[saved], framework="pt") as file:
            part = file.get_slice(saved)
            shape, kind = list(part.get_shape()), _dtype(part.get_dtype())
        kind = dtype if dtype is not None and kind.is_floating_point else kind
        entries.append((name, str(kind), shape, partial(_digest, places[saved], saved, kind)))
        sizes.append(torch.Size(shape).numel() * kind.itemsize)
    known = {alias for aliases in sources.values() for alias in aliases}
    strange = sorted(places.keys() - known)
    if strange:
        raise ReferencePolicyError(
            f"The files in {folder} have {len(strange)} tensors that the model does not, such as '{strange[0]}'. Load "
            "the model and take `model_fingerprint`."
        )
    return combined(entries, sizes, as_bytes(computation(model)))


def _refuse_changes(folder: Path, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    quantised = getattr(model.config, "quantization_config", None) is not None
    kept = kept_in_float32(model)
    if quantised or (kept and dtype not in (None, torch.float32)):
        why = "quantises" if quantised else f"keeps {kept} in float32"
        raise ReferencePolicyError(
            f"{type(model).__name__} from {folder} {why} on loading, so its files are not its weights. Load the model "
            "and take `model_fingerprint`."
        )


def _sources(model: PreTrainedModel) -> dict[str, list[str]]:
    """Each tensor by the name that a fingerprint knows it by, with all the names it may be saved under."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    return {name: names[id(tensor)] for name, tensor in base_tensors(model).items()}


def _places(folder: Path) -> dict[str, Path]:
    """Name of each saved tensor to its file."""
    try:
        if (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            return {name: folder / file for name, file in index["weight_map"].items()}
        with safe_open(folder / _SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / _SINGLE)
    except (OSError, ValueError, KeyError) as error:
        raise ReferencePolicyError(
            f"{folder} has no readable {_SINGLE} or {_INDEX} ({error}); pickled weights are never read. Save the model "
            "again with save_pretrained."
        ) from error


def _dtype(name: str) -> torch.dtype:
    known = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
    if name not in known:
        raise ReferencePolicyError(f"The files hold tensors of type {name}, which is none of {', '.join(known)}.")
    return known[name]


def _digest(path: Path, name: str, dtype: torch.dtype) -> bytes:
    with safe_open(path, framework="pt") as file:
        return digest_of(file.get_tensor(name).to(dtype))
