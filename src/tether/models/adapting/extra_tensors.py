"""Tensors of the base that a saved adapter must bring with it: those that trained beside it, or came with another one.

PEFT writes what its own kind of adapter consists of and nothing else. What else is in an adapter's file, under its name
in the `PeftModel`, PEFT puts in place when it loads the adapter, as it does with resized embeddings. So what would be
lost is added to the file, and what PEFT would restore from a file is asked of PEFT and not read off names.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tether.compat.peft import restored_tensors
from tether.errors import ConfigError, TetherError
from tether.models.structure import adapter_tensors, trainable_tensors, transformers_model, unwrap

WEIGHTS = "adapter_model.safetensors"
_CARD = "README.md"
_HEADING = "## Tensors of the base model in this adapter"
# What PEFT puts between a module of the base and its parameters.
_WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
# Names of the base's tensors that an adapter brought when it was loaded; nothing else in the model says so.
_BROUGHT: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def remember_brought(model: PeftModel, folder: Path, adapter: str) -> None:
    """Keep in mind which tensors of the base an adapter has just brought with it, so that they are saved again.

    Raises:
        ConfigError: see `refuse_lost`.
    """
    found = {name for name in refuse_lost(model, folder, adapter) if name in _of_base(model)}
    _BROUGHT[model] = _BROUGHT.get(model, set()) | found


def refuse_lost(model: PeftModel, folder: Path, adapter: str) -> list[str]:
    """Refuse an adapter that has just been loaded where its file holds tensors that PEFT has passed over.

    Returns:
        Names of the model's tensors that came from the file.

    Raises:
        ConfigError: there are such tensors: what was trained is not what was loaded; or numbers in it are not finite.
    """
    tensors = load_file(folder / WEIGHTS)
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]:
        raise ConfigError(
            f"The adapter '{folder}' holds {len(broken)} tensors with numbers that are not finite, such as "
            f"{broken[0]!r}. Copy it again, or take an earlier checkpoint of its run."
        )
    placed, lost = restored_tensors(model, tensors, adapter)
    if lost:
        raise ConfigError(
            f"The adapter '{folder}' holds {len(lost)} tensors that have no place in this model, such as {lost[0]!r}: "
            "what is loaded would be another adapter than was trained. Correct its adapter_config.json (such as "
            "target_modules or modules_to_save), or name the base that it was made on."
        )
    return placed


def refuse_brought(model: PeftModel, folder: Path) -> None:
    """Refuse to load an adapter beside another one where it would change the base under both.

    Raises:
        ConfigError: its file holds tensors of the base.
    """
    ours = {_WRAPPERS.sub("", name) for name in _of_base(model)}
    theirs = [name for name in load_file(folder / WEIGHTS) if _WRAPPERS.sub("", name) in ours]
    if theirs:
        raise ConfigError(
            f"The adapter '{folder}' holds {len(theirs)} tensors of its base model, such as {theirs[0]!r}, which "
            "trained beside it; loaded beside the policy's adapter it would change the policy. Merge it into its base "
            "with merge_and_unload(), save that, and name the result as the model (`ref_model`)."
        )


def shared_by_hand(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that are another one's by the program and not by the configuration, under the names that loading lacks.

    A head that was set to the embeddings' weight is one. A model that is loaded has a tensor of its own there.
    """
    declared = getattr(transformers_model(model), "all_tied_weights_keys", None) or {}
    tied, tensors = {*declared, *declared.values()}, _of_base(model)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    shared = (group for group in names.values() if len(group) > 1)
    # The first name is written in any case, and so are those that the configuration leads to.
    return {name: tensors[name] for group in shared for name in group[1:] if _plain(name, model) not in tied}


def write_beside(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> list[str]:
    """Add to an adapter's file what of the trained tensors PEFT has not written, and say so in the folder's card.

    Args:
        model: with adapters, which PEFT has written into `folder`.
        folder: with their files.
        state: whole tensors by name, where the model's own are shards.

    Returns:
        The names of the tensors of the base that the folder holds.

    Raises:
        TetherError: a trained tensor is in no file in a form that PEFT restores.
    """
    inner = unwrap(model)
    if not isinstance(inner, PeftModel):
        return []
    wanted = {**trainable_tensors(inner), **_brought(inner), **shared_by_hand(inner)}
    places = {name: folder if name == "default" else folder / name for name in inner.peft_config}
    trained = next((name for name in inner.active_adapters), next(iter(places)))
    lost = _lost(inner, wanted, places)
    if lost:
        path = places[trained] / WEIGHTS
        tensors = load_file(path)
        for name in lost:
            value = state[name] if state is not None and name in state else wanted[name]
            tensors[name] = value.detach().cpu().contiguous().clone()
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata={"format": "pt"})
        os.replace(part, path)
        still = _lost(inner, wanted, places)
        if still:
            raise TetherError(
                f"{len(still)} trained tensors, such as {still[0]!r}, would be in no file that PEFT restores them "
                f"from; the adapter in {places[trained]} is incomplete. Train them as part of the adapter "
                "(`modules_to_save`), or leave them frozen (`freeze_parameters`)."
            )
    held = sorted(set(_restored(inner, places[trained], trained)) & _of_base(inner).keys())
    if held:
        _write_card(places[trained] / _CARD, held)
    return held


def _lost(model: PeftModel, wanted: Mapping[str, Tensor], places: Mapping[str, Path]) -> list[str]:
    """Names, of those that are wanted, under which PEFT would restore nothing from the files."""
    every = dict(model.named_parameters(remove_duplicate=False))
    found = {name for adapter, place in places.items() for name in _restored(model, place, adapter)}
    # A tensor that trains is restored under any of its names; one that is shared by hand only under the name given.
    by_hand = shared_by_hand(model)
    reached = {id(every[name]) for name in found if name in every}
    return [
        name for name, tensor in wanted.items() if name not in found and (name in by_hand or id(tensor) not in reached)
    ]


def _restored(model: PeftModel, folder: Path, adapter: str) -> list[str]:
    path = folder / WEIGHTS
    return restored_tensors(model, load_file(path), adapter)[0] if path.is_file() else []


def _brought(model: PeftModel) -> dict[str, Tensor]:
    tensors = _of_base(model)
    return {name: tensors[name] for name in sorted(_BROUGHT.get(model, set())) if name in tensors}


def _of_base(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of the base that is not an adapter's, under all its names."""
    inner, prefix = unwrap(model), _prefix(model)
    adapter = {id(tensor) for tensor in adapter_tensors(inner).values()}
    named = inner.named_parameters(remove_duplicate=False)
    return {name: tensor for name, tensor in named if name.startswith(prefix) and id(tensor) not in adapter}


def _plain(name: str, model: nn.Module) -> str:
    """A base tensor's name in the transformers model without adapters."""
    return _WRAPPERS.sub("", name.removeprefix(_prefix(model)))


def _prefix(model: nn.Module) -> str:
    base = transformers_model(model)
    path = next(path for path, module in unwrap(model).named_modules() if module is base)
    return f"{path}." if path else ""


def _write_card(card: Path, held: list[str]) -> None:
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    shown = "\n".join(f"- `{name}`" for name in held[:20])
    more = f"\n- and {len(held) - 20} more" if len(held) > 20 else ""
    section = (
        f"{_HEADING}\n\n`{WEIGHTS}` also holds tensors of the base model ({len(held)}), which trained beside the "
        "adapter or came with the one that it continues. PEFT puts them in place when it loads the adapter "
        "(`PeftModel.from_pretrained`), and `merge_and_unload` keeps them. Switching the adapter off leaves them on; "
        "a second adapter on the same base sees them too.\n\n"
        f"{shown}{more}\n"
    )
    card.write_text(text.partition(_HEADING)[0].rstrip() + f"\n\n{section}", encoding="utf-8")
