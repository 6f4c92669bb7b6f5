"""Adapters that begin by writing into the base weights (PiSSA, OLoRA and their kin), saved as plain LoRA.

Such an adapter is right only on the base that it left, which nobody saves: PEFT writes into the base once more when it
loads the adapter, which gives another base where random numbers are drawn, where gradients were needed, or on another
machine. What was learnt is the difference from the adapter's first values, B A - B0 A0, which is itself a LoRA of twice
the rank, [B, -B0] [A; A0], on the base as it was before.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tether.errors import ConfigError
from tether.models.adapting.extra_tensors import WEIGHTS
from tether.models.structure import unwrap

_CONFIG = "adapter_config.json"
# Which factor a tensor of a LoRA's file is of, and along which dimension its ranks lie.
_RANKS = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
_INITIAL: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def named_initialisation(config: Any) -> bool:
    """Whether an adapter begins by a named initialisation, which may write into the base."""
    return isinstance(config, LoraConfig) and isinstance(config.init_lora_weights, str)


def remember_initial(model: PeftModel) -> None:
    """Keep the first values of a new adapter that has written into its base."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    _INITIAL[model] = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items() if _rank_of(name) >= 0}


def is_rewritten(model: nn.Module) -> bool:
    """Whether a model's adapter was made here and wrote into the base."""
    return unwrap(model) in _INITIAL


def write_plain(model: nn.Module, folder: Path) -> None:
    """Turn the files that PEFT has written of such an adapter into those of a plain LoRA; nothing for another one."""
    initial = _INITIAL.get(unwrap(model))
    if initial is None:
        return
    tensors = load_file(folder / WEIGHTS)
    for name, first in initial.items():
        dimension = _rank_of(name)
        first = -first if dimension == 1 else first
        tensors[name] = torch.cat([tensors[name], first.to(tensors[name].dtype)], dimension).contiguous()
    part = (folder / WEIGHTS).with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    os.replace(part, folder / WEIGHTS)
    _double_rank(folder / _CONFIG)


def load_plain(model: nn.Module | None, folder: str | Path) -> bool:
    """Load a checkpoint of such an adapter into a model whose adapter has begun in the same way.

    Returns:
        Whether the model's adapter is one, so that it was loaded here.

    Raises:
        ConfigError: this run's adapter began elsewhere, so that its base is another one.
    """
    inner = unwrap(model) if model is not None else None
    initial = _INITIAL.get(inner) if inner is not None else None
    if initial is None or not isinstance(inner, PeftModel):
        return False
    tensors = load_file(Path(folder) / WEIGHTS)
    for name, first in initial.items():
        dimension = _rank_of(name)
        wanted = -first if dimension == 1 else first
        both = tensors.get(name)
        rank = first.shape[dimension]
        if both is None or both.shape[dimension] != 2 * rank:
            raise ConfigError(f"The checkpoint {folder} is of another adapter than this run's: {name!r} does not fit.")
        tensors[name], start = (half.contiguous() for half in both.split(rank, dimension))
        if not torch.equal(start, wanted.to(start.dtype)):
            raise ConfigError(
                f"The adapter of the checkpoint {folder} began with other values ({name!r}) than this run's, which is "
                "initialised anew from the base (as PiSSA and OLoRA are), so the bases under the two differ. Resume "
                "with the same base, seed, machine and libraries; or start a new run from the checkpoint's folder."
            )
    set_peft_model_state_dict(inner, tensors, inner.active_adapters[0])
    return True


def _rank_of(name: str) -> int:
    """The dimension of a tensor along which its ranks lie; -1 for one without ranks."""
    return next((_RANKS[part] for part in name.split(".") if part in _RANKS), -1)


def _double_rank(path: Path) -> None:
    """Twice the rank at the same scale, with the ordinary initialisation."""
    config = json.loads(path.read_text(encoding="utf-8"))
    # The scale is alpha / r, or alpha / sqrt(r) with rslora.
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    config["init_lora_weights"] = True
    config["r"] *= 2
    config["lora_alpha"] *= factor
    for name, by in (("rank_pattern", 2), ("alpha_pattern", factor)):
        config[name] = {key: value * by for key, value in (config.get(name) or {}).items()}
    for name in ("corda_config", "eva_config", "lora_ga_config", "loftq_config"):
        if name in config:
            config[name] = {} if name == "loftq_config" else None
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
