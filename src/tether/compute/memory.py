"""Memory: what the machine has, what is free and in use, and how many tokens a forward may have by it."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tether.compat.launcher import processes_here
from tether.compute.cgroups import groups, read
from tether.models.structure import trainable_tensors, transformers_model

# A forward with more tokens than this is no faster for each of them, so a budget is never larger: the split of a step
# then depends on the machine only where memory is short.
_ENOUGH = {"cpu": 4096, "cuda": 32768}
# A forward with fewer is slower for each of them; where even this does not fit, the user has to say so.
_LEAST = 1024
# Of the memory that is left, this share is for activations; kernels, fragments and the head's chunks need the rest.
_SHARE = 0.5
# A model is loaded where this many times its weights are free: loading holds some tensors twice for a while.
LOADING_ROOM = 1.25
# What a control group of version 2, and of version 1, calls its limit.
_LIMITS = ("memory.max", "memory.limit_in_bytes")
# Beside each number that trains: its gradient and two moments of an optimizer, in float32.
TRAINING_BYTES = 12


def token_budget(
    setting: int | str | None, model: nn.Module, device: torch.device, *, checkpointing: bool, room: int | None = None
) -> tuple[int | None, str]:
    """The tokens of a forward and a line that says where the number comes from.

    Args:
        setting: the tokens, `auto`, or None for no limit.
        model: the policy, in place on its device; the optimizer is not made yet.
        device: where it is.
        checkpointing: whether activations inside layers are computed again in the backward.
        room: bytes for activations, of a machine that is not this one; None: what `free_bytes` finds here.
    """
    if setting is None:
        return None, "batching: each batch in one forward, however long"
    if isinstance(setting, int):
        return setting, f"batching: at most {setting} tokens a forward (max_tokens_per_forward)"
    need = bytes_per_token(model, checkpointing=checkpointing)
    room = free_bytes(model, device) if room is None else room
    fitting = int(max(room, 0) * _SHARE / need)
    enough = _ENOUGH.get(device.type, _ENOUGH["cuda"])
    # A power of two, so that a few bytes more or less do not change how a step is split.
    tokens = max(_LEAST, min(enough, 1 << max(fitting, 1).bit_length() - 1))
    return tokens, (
        f"batching: at most {tokens} tokens a forward (auto: {room / 2**30:.1f} GiB for activations of about "
        f"{need / 2**20:.2f} MiB a token; at most {enough} on {device.type})"
    )


def bytes_per_token(model: nn.Module, *, checkpointing: bool) -> int:
    """Memory that one token of a forward needs until its backward, estimated from the shapes of the weights.

    Without checkpointing every product keeps its input, and what it returns goes into something that keeps its own:
    input and output features of all weight matrices, twice for what lies between them (norms, activations,
    positions), in float32, which mixed precision uses beside bfloat16. With checkpointing one layer at a time has
    that, and of the others only the input is kept. The head's hidden states and their gradient come on top.
    """
    inner = transformers_model(model)
    config: Any = inner.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None) or 1
    hidden = config.hidden_size
    head = inner.get_output_embeddings()
    features = sum(_features(module, config) for module in inner.modules() if module is not head)
    kept = features // layers + layers * hidden if checkpointing else features
    return 4 * (2 * kept + 4 * hidden)


def _features(module: Any, config: Any) -> int:
    """Input and output features of the weight matrices that a module holds itself."""
    if isinstance(module, nn.Embedding) or next(module.children(), None) is not None:
        return 0
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features + module.out_features
    experts = getattr(config, "num_experts_per_tok", None) or 1
    weights = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() in (2, 3)]
    return sum(sum(weight.shape[-2:]) * (experts if weight.dim() == 3 else 1) for weight in weights)


def free_bytes(model: nn.Module, device: torch.device) -> int:
    """Memory for activations: on CUDA what is free, elsewhere this process' share of the machine's less the weights.

    Not what happens to be free on a CPU: the same run on the same machine must split its steps alike. Gradients and two
    moments of the optimizer, in float32, are left for the trainable tensors.
    """
    later = TRAINING_BYTES * sum(tensor.numel() for tensor in trainable_tensors(model).values())
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached - later
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    return machine_bytes() // processes_here() - weights - later


def machine_bytes() -> int:
    """Memory of the machine, or what the control groups of this process may use of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    texts = [read(group / name) for group in groups("memory") for name in _LIMITS]
    return min([*limits, *(int(text) for text in texts if text.isdigit())], default=8 * 2**30)


def room_for_another(device: torch.device) -> int:
    """Bytes that a second model may take now, which is loaded through the host's memory."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    room = min([machine_bytes() - used, *found])
    return min(room, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else room


def give_back() -> None:
    """Give memory that is free back to the system, where the C library keeps it (glibc); elsewhere nothing.

    A training step leaves its heap in pieces: after one of a LoRA on 138 million weights 0.9 GiB that no tensor held.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use at once: a GPU's by this process's tensors, else the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
