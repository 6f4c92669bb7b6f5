"""What `tether doctor` says of this machine: versions, devices, memory, and the command that mends what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

# What options of a run file need besides Tether's own requirements: package, what for.
_OPTIONAL = {
    "bitsandbytes": "model.quantization: 4bit or 8bit, 8-bit optimizers",
    "torchao": "model.quantization: int8",
    "deepspeed": "train.deepspeed",
    "flash_attn": "train.attention_backend: flash",
    "wandb": "train.report_to: wandb",
    "tensorboard": "train.report_to: tensorboard",
    "trackio": "train.report_to: trackio",
    "mlflow": "train.report_to: mlflow",
}
_LITTLE_DISK = 5 * 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report: `ok`, `note` (worth knowing) or `problem` (training would be wrong or impossible)."""

    level: str
    text: str


def findings() -> list[Finding]:
    """All there is to say of the environment, a line each."""
    return [*_versions(), *_devices(), *_places(), *_options()]


def _versions() -> list[Finding]:
    from packaging.requirements import Requirement

    found = [Finding("ok", f"Python {platform.python_version()} on {platform.platform(terse=True)}")]
    wanted = [Requirement(text) for text in requires("tether") or ()]
    names = []
    for one in wanted:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(one.name)
        except PackageNotFoundError:
            found.append(Finding("problem", f"{one.name} is missing. Mend: pip install '{one.name}{one.specifier}'"))
            continue
        if one.specifier.contains(have, prereleases=True):
            names.append(f"{one.name} {have}")
        else:
            text = f"{one.name} is {have}, and Tether needs {one.specifier}."
            found.append(Finding("problem", f"{text} Mend: pip install '{one.name}{one.specifier}'"))
    return [*found, Finding("ok", f"packages: {', '.join(names)}")]


def _devices() -> list[Finding]:
    import torch

    from tether.compute.memory import machine_bytes

    memory = machine_bytes() / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [Finding("ok", f"CPU: {cores} cores for this process, {torch.get_num_threads()} threads, {memory:.1f} GiB")]
    for index in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(index)
        found.append(Finding("ok", f"GPU {index}: {one.name}, {one.total_memory / 2**30:.1f} GiB"))
    if torch.cuda.device_count():
        return found
    if shutil.which("nvidia-smi"):
        text = "there is nvidia-smi, and torch sees no GPU. Mend: install torch's build for your CUDA version"
        return [*found, Finding("problem", f"{text} (pytorch.org has the command), and check CUDA_VISIBLE_DEVICES")]
    return [*found, Finding("note", "no GPU that torch can use: runs compute on the CPU")]


def _places() -> list[Finding]:
    from tether.models.gguf import cache_root

    found = []
    for name, folder in (("runs", Path.cwd()), ("cache", cache_root())):
        there = next(one for one in (folder, *folder.parents) if one.exists())
        free = shutil.disk_usage(there).free
        text = f"{name}: {folder}, {free / 2**30:.1f} GiB free"
        if not os.access(there, os.W_OK):
            mend = "set TETHER_CACHE to a folder that can" if name == "cache" else "start in a folder that can"
            found.append(Finding("problem", f"{text}; it cannot be written to. Mend: {mend}"))
        elif free < _LITTLE_DISK:
            found.append(
                Finding("note", f"{text}: little for checkpoints. Mend: `train.save_total_limit: 1`, or free some")
            )
        else:
            found.append(Finding("ok", text))
    return found


def _options() -> list[Finding]:
    there = [name for name in _OPTIONAL if importlib.util.find_spec(name) is not None]
    missing = [f"{name} ({purpose})" for name, purpose in _OPTIONAL.items() if name not in there]
    found = [Finding("ok", f"optional packages: {', '.join(there)}")] if there else []
    if missing:
        found.append(Finding("note", f"not installed, and needed only where asked for: {', '.join(missing)}"))
    return found
