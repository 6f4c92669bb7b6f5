"""What a server of completions is given of a policy: its LoRA adapter alone, or all weights with adapters merged."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from tether.compat.peft import ADDED, layer_under, merged_layer
from tether.compat.torch import own_state
from tether.compat.transformers import without_bars
from tether.errors import RolloutError
from tether.models.adapting.base_rewriting import is_rewritten
from tether.models.structure import adapter_configs, trainable_tensors, transformers_model, unwrap

# In memory, where the machine has it: weights go through this folder after each step.
_MEMORY = Path("/dev/shm")
_FACTORS = ("lora_A", "lora_B")
# What changes what a LoRA computes in a way that its two factors do not say, or that servers do not read.
_BEYOND = (
    *("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "lora_bias"),
    *("alora_invocation_tokens", "layer_replication"),
)


def exchange_folder() -> Path:
    """A new folder for weights on their way to a server of this machine; it goes when the process ends."""
    parent = _MEMORY if _MEMORY.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="tether-weights-", dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def lora_alone(policy: nn.Module) -> tuple[str, int] | None:
    """Name and rank of the one adapter that is all that differs from the base; None where a LoRA file cannot say it."""
    inner = unwrap(policy)
    if not isinstance(inner, PeftModel) or is_rewritten(policy) or len(inner.active_adapters) != 1:
        return None
    name = inner.active_adapters[0]
    config = adapter_configs(policy)[name]
    if type(config) is not LoraConfig or any(getattr(config, one, None) for one in _BEYOND) or config.bias != "none":
        return None
    if len(adapter_configs(policy)) != 1 or not all(_is_factor(path) for path in trainable_tensors(policy)):
        return None
    patterns = (getattr(config, "rank_pattern", None) or {}).values()
    return name, max([config.r, *patterns])


def _is_factor(path: str) -> bool:
    return any(f".{factor}." in path for factor in _FACTORS)


def write_adapter(policy: nn.Module, name: str, folder: Path) -> Path:
    """Write the adapter's files; gives the folder that they are in."""
    inner: Any = unwrap(policy)
    inner.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False, state_dict=own_state(inner))
    return folder if name == "default" else folder / name


def write_merged(policy: nn.Module, folder: Path, *, base: bool = False) -> None:
    """Write all weights, adapters merged; the policy stays as it is.

    Args:
        policy: the model in training.
        folder: where to.
        base: without the adapters, which the server is then given alone.

    Raises:
        RolloutError: the base is quantised, so that nothing can be merged into it.
    """
    inner = transformers_model(policy)
    if getattr(inner, "hf_quantizer", None) is not None:
        raise RolloutError(
            "The policy's base is quantised, so that no adapter can be merged into it, and its weights cannot be sent "
            "to a server. Sample with the engine auto."
        )
    with without_bars():  # once a step
        inner.save_pretrained(folder, state_dict=merged_state(inner, base=base))


def merged_state(inner: nn.Module, *, base: bool = False) -> dict[str, Tensor]:
    """The weights of a transformers model by the names that it has without adapters, one layer merged at a time."""
    added = {path: module for path, module in inner.named_modules() if isinstance(module, ADDED)}
    outer = {
        path: module
        for path, module in added.items()
        if not any(path.startswith(f"{other}.") for other in added if other != path)
    }
    found = {
        name: value
        for name, value in own_state(inner).items()
        if not any(name.startswith(f"{path}.") for path in outer)
    }
    for path, layer in outer.items():
        plain = layer_under(layer) if base else merged_layer(layer)
        found |= {f"{path}.{name}": value for name, value in own_state(plain).items()}
    return found
