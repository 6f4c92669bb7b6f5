"""A tiny model of every family of causal language models that the installed transformers has, for sweeps over them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
_LARGEST = 3_000_000
# Fields by which some family or other says its size; a configuration takes those that it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "dff": 64,
    "d_inner": 64,
    "ffn_hidden_size": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 250,
    "n_positions": 250,
    "max_seq_len": 250,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "rotary_dim": 8,
    "sliding_window": 7,
    "query_pre_attn_scalar": 8,
    "dropout": 0.0,
}
# Where these sizes contradict each other, or more is needed.
_CHANGES: dict[str, dict[str, Any]] = {
    "GPTNeoConfig": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 7},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "Dots3NoteTextConfig": {"num_key_value_heads": 4},
    "Dots1Config": {"n_shared_experts": 1},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8},
    "ReformerConfig": {"is_decoder": True, "axial_pos_embds": False},
}
# These sizes give a model that cannot be called at all, and no others are known here.
_UNFIT = {"LongcatFlashConfig"}


def families() -> list[str]:
    """Names of the configurations, in order."""
    return sorted({kind.__name__ for kind in MODEL_FOR_CAUSAL_LM_MAPPING})


def tiny_config(name: str) -> Any:
    """A small configuration of a family."""
    kind: Any = next(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING if kind.__name__ == name)
    plain = kind()
    known = {**plain.to_dict(), **{key: None for key in getattr(kind, "attribute_map", {})}}
    fields = {key: value for key, value in _SIZES.items() if key in known}
    if "qk_rope_head_dim" in known:
        fields |= {"num_key_value_heads": 4}  # keys and values are expanded from their latents for every head
        fields.pop("head_dim", None)  # it follows from its parts
    layers = getattr(plain, "layer_types", None)
    set_by = getattr(kind, "attribute_map", {}).get("layer_types", "layer_types")
    if layers and not isinstance(getattr(kind, set_by, None), property):
        fields["layer_types"] = list(dict.fromkeys(layers))[:2] * (2 if len(set(layers)) == 1 else 1)
    return kind(**{**fields, **_CHANGES.get(name, {})})


def tiny_family(name: str, *, decoder: bool = True) -> PreTrainedModel | None:
    """A random model of a family with weights large enough that differences show; None where it cannot be small."""
    config = tiny_config(name)
    # Models of the BERT kind read the whole row unless they are told that they are decoders.
    if getattr(config, "is_decoder", None) is False and decoder:
        config.is_decoder = True
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST or name in _UNFIT:
        return None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model
