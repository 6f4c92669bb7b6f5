"""A small configuration of every kind of adapter that the installed PEFT has, for sweeps over them."""

from __future__ import annotations

from typing import Any

import peft
from peft import PeftConfig, PeftType

LAYERS = ["q_proj", "v_proj", "down_proj"]
SQUARE = ["q_proj", "o_proj"]
# Configuration class and its fields; `target_modules` unless the kind has none.
FIELDS: dict[PeftType, tuple[str, dict[str, Any]]] = {
    PeftType.PROMPT_TUNING: ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    PeftType.MULTITASK_PROMPT_TUNING: ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 3, "num_tasks": 2}),
    PeftType.P_TUNING: ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    PeftType.PREFIX_TUNING: ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    PeftType.LORA: ("LoraConfig", {"r": 2, "target_modules": LAYERS}),
    PeftType.ADALORA: ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": LAYERS}),
    PeftType.ADAMSS: ("AdamssConfig", {"r": 4, "num_subspaces": 2, "target_modules": ["q_proj"]}),
    PeftType.BOFT: ("BOFTConfig", {"boft_block_size": 4, "target_modules": SQUARE}),
    PeftType.ADAPTION_PROMPT: ("AdaptionPromptConfig", {"adapter_len": 2, "adapter_layers": 1}),
    PeftType.IA3: ("IA3Config", {"target_modules": LAYERS, "feedforward_modules": ["down_proj"]}),
    PeftType.BEFT: ("BeftConfig", {"target_modules": LAYERS}),
    PeftType.LILY: ("LilyConfig", {"r": 2, "target_modules": SQUARE}),
    PeftType.LOHA: ("LoHaConfig", {"r": 2, "target_modules": LAYERS}),
    PeftType.LOKR: ("LoKrConfig", {"r": 2, "target_modules": LAYERS}),
    PeftType.OFT: ("OFTConfig", {"oft_block_size": 4, "target_modules": LAYERS}),
    PeftType.POLY: ("PolyConfig", {"r": 2, "n_tasks": 2, "n_skills": 2, "target_modules": LAYERS}),
    PeftType.LN_TUNING: ("LNTuningConfig", {}),
    PeftType.VERA: ("VeraConfig", {"r": 2, "target_modules": SQUARE}),
    PeftType.FROD: ("FrodConfig", {"target_modules": SQUARE}),
    PeftType.PVERA: ("PveraConfig", {"r": 2, "target_modules": SQUARE}),
    PeftType.FOURIERFT: ("FourierFTConfig", {"n_frequency": 8, "target_modules": LAYERS}),
    PeftType.GLORA: ("GloraConfig", {"r": 2, "target_modules": LAYERS}),
    PeftType.XLORA: ("XLoraConfig", {"hidden_size": 32, "adapters": {}}),
    PeftType.HRA: ("HRAConfig", {"r": 2, "target_modules": LAYERS}),
    PeftType.VBLORA: (
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2, "target_modules": LAYERS},
    ),
    PeftType.UNILORA: ("UniLoraConfig", {"r": 2, "target_modules": LAYERS}),
    PeftType.CPT: (
        "CPTConfig",
        {
            "task_type": "CAUSAL_LM",
            "cpt_token_ids": [5, 6, 7],
            "cpt_mask": [1, 1, 1],
            "cpt_tokens_type_mask": [1, 2, 3],
        },
    ),
    PeftType.MISS: ("MissConfig", {"r": 2, "target_modules": LAYERS}),
    PeftType.RANDLORA: ("RandLoraConfig", {"r": 2, "target_modules": LAYERS}),
    PeftType.ROAD: ("RoadConfig", {"group_size": 4, "target_modules": LAYERS}),
    PeftType.TRAINABLE_TOKENS: ("TrainableTokensConfig", {"token_indices": [5, 6], "target_modules": ["embed_tokens"]}),
    PeftType.HIRA: ("HiraConfig", {"r": 2, "target_modules": LAYERS}),
    PeftType.SHIRA: ("ShiraConfig", {"r": 2, "target_modules": LAYERS}),
    PeftType.C3A: ("C3AConfig", {"block_size": 8, "target_modules": SQUARE}),
    PeftType.WAVEFT: ("WaveFTConfig", {"n_frequency": 8, "target_modules": LAYERS}),
    PeftType.OSF: ("OSFConfig", {"target_modules": SQUARE, "effective_rank": 4}),
    PeftType.DELORA: ("DeloraConfig", {"r": 2, "target_modules": LAYERS}),
    PeftType.GRALORA: ("GraloraConfig", {"r": 4, "gralora_k": 2, "target_modules": LAYERS}),
    PeftType.CARTRIDGE: ("CartridgeConfig", {"num_virtual_tokens": 3}),
    PeftType.TINYLORA: ("TinyLoraConfig", {"r": 2, "target_modules": LAYERS}),
    PeftType.PSOFT: ("PsoftConfig", {"r": 4, "target_modules": SQUARE}),
    PeftType.PEANUT: ("PeanutConfig", {"target_modules": SQUARE}),
    PeftType.SHADOW: ("ShadowConfig", {}),
    PeftType.SUPERTUNING: ("SupertuningConfig", {"target_modules": LAYERS}),
    PeftType.DEFT: ("DeftConfig", {"target_modules": SQUARE}),
}
# Variants of LoRA that compute, begin or are chosen otherwise.
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "alora": {"alora_invocation_tokens": [5, 6]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 6]},
    "bias": {"bias": "lora_only", "lora_bias": False},
    "lora_bias": {"lora_bias": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "one_layer": {"layers_to_transform": [1]},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 3}},
}


def config_of(name: str) -> PeftConfig:
    """The configuration of a kind, or of a variant of LoRA."""
    if name in VARIANTS:
        kind, fields = FIELDS[PeftType.LORA]
        return getattr(peft, kind)(**{**fields, **VARIANTS[name]})
    kind, fields = FIELDS[PeftType[name]]
    return getattr(peft, kind)(**fields)


KINDS = [kind.name for kind in PeftType]
