"""What a saved model can go into: which folder to give to vLLM, llama.cpp and others, or why it does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from safetensors import safe_open

from tether.errors import ConfigError
from tether.evaluate.named_models import NamedModel
from tether.models.adapters import ACTIVE, kind_of
from tether.models.adapting.adapter_files import adapter_config, require_weights
from tether.models.adapting.extra_tensors import WEIGHTS
from tether.models.load import is_adapter, load_config

# Ranks that vLLM has kernels for; `--max-lora-rank` takes one of them.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Target:
    """A program that a model can go into.

    Args:
        name: of the program.
        fits: whether the folder can be given to it as it is.
        reason: why it cannot; empty where it can.
        commands: what to run, in order.
        tried: what was tried of this with Tether's own models, or that nothing was.
    """

    name: str
    fits: bool
    reason: str
    commands: tuple[str, ...]
    tried: str


def targets(named: NamedModel) -> list[Target]:
    """What can be done with the folder of a model.

    Args:
        named: a run, a checkpoint or a folder; a reference has none of its own.

    Raises:
        ConfigError: there is no folder.
    """
    folder = Path(named.source).expanduser()
    if named.role == "reference" or not folder.is_dir():
        raise ConfigError(
            f"'{named.name}' leads to no folder that could go anywhere. Name a run, a checkpoint or a folder."
        )
    if is_adapter(folder):
        return list(_of_adapter(named, folder))
    return list(_of_whole(named, folder))


def _of_adapter(named: NamedModel, folder: Path) -> Iterator[Target]:
    config, base = adapter_config(folder), named.base_source()[0]
    merged = f"{folder.name or 'model'}-merged"
    merge = f"tether merge {named.name} --output {merged}"
    objection = _not_plain_lora(config, folder)
    rank = max(_ranks(config), default=0)
    room = next((one for one in VLLM_RANKS if one >= rank), None)
    own = objection or ("" if room else f"its rank is {rank}, and vLLM has kernels up to {VLLM_RANKS[-1]}")
    serve = f"vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules {folder.name}={folder}"
    yield Target("PEFT", True, "", (f'PeftModel.from_pretrained(base, "{folder}")',), _TRIED["peft"])
    yield Target("vLLM", not own, own, (serve,) if not own else (merge, f"vllm serve {merged}"), _TRIED["vllm"])
    lora = (
        f"python convert_hf_to_gguf.py {base} --outfile base.gguf --outtype bf16",
        f"python convert_lora_to_gguf.py --base {base} {folder} --outfile adapter.gguf",
        "llama-cli -m base.gguf --lora adapter.gguf",
    )
    yield Target(
        "llama.cpp", not objection, objection, lora if not objection else (merge, *_gguf(merged)), _TRIED["gguf"]
    )


def _of_whole(named: NamedModel, folder: Path) -> Iterator[Target]:
    config: Any = load_config(folder)
    kind = "AutoModelForSequenceClassification" if named.classifies else "AutoModelForCausalLM"
    yield Target("transformers", True, "", (f'{kind}.from_pretrained("{folder}")',), _TRIED["transformers"])
    pooling = " --runner pooling" if named.classifies else ""
    yield Target("vLLM", True, "", (f"vllm serve {folder}{pooling}",), _TRIED["vllm"])
    why = "llama.cpp reads no reward head of this kind" if named.classifies else ""
    if not named.classifies and getattr(config, "quantization_config", None) is not None:
        why = "its weights are quantised by transformers; llama.cpp quantises by itself, from plain weights"
    yield Target("llama.cpp", not why, why, () if why else _gguf(str(folder)), _TRIED["gguf"])


def _gguf(folder: str) -> tuple[str, ...]:
    return (
        f"python convert_hf_to_gguf.py {folder} --outfile model.gguf --outtype bf16",
        "llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M",
    )


def _ranks(config: PeftConfig) -> list[int]:
    return [config.r, *(config.rank_pattern or {}).values()] if isinstance(config, LoraConfig) else []


def _not_plain_lora(config: PeftConfig, folder: Path) -> str:
    """Why other programs would not compute what was trained; empty where they do."""
    if not isinstance(config, LoraConfig):
        return f"the adapter is {kind_of(config)}, and only LoRA is read"
    if (folder / ACTIVE).is_file():
        active = json.loads((folder / ACTIVE).read_text(encoding="utf-8"))["active"]
        return f"{len(active)} adapters are active together, and one is read"
    if config.use_dora:
        return "it is DoRA, and only plain LoRA is read"
    if config.bias != "none":
        return f"it trained biases ({config.bias}), which are not read"
    require_weights(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        odd = [name for name in file.keys() if ".lora_A." not in name and ".lora_B." not in name]  # noqa: SIM118
    return f"its file holds {len(odd)} tensors that are no LoRA, such as {odd[0]}, which are not read" if odd else ""


_TRIED = {
    "peft": "loaded so by Tether's tests, to the same log-probs",
    "transformers": "loaded so by Tether's tests, to the same log-probs",
    "vllm": "tried with the demo's adapter, as it is and merged (vLLM 0.32 on a CPU): log-probs of PEFT's",
    "gguf": "tried with the demo's adapter, as it is and merged, in float32: log-probs within 0.004 of PEFT's",
}
