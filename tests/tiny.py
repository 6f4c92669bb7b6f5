"""Tiny random models, built from configs; nothing is downloaded."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tether.types import Example

VOCABULARY = 97
# What a training run needs to leave nothing behind and to say every step.
QUIET = {
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW = 7
CONFIGS = {
    "llama": ("LlamaConfig", _SHAPE),
    "qwen2": ("Qwen2Config", _SHAPE),
    "qwen3": ("Qwen3Config", {**_SHAPE, "head_dim": 8}),
    "mistral_window": ("MistralConfig", {**_SHAPE, "sliding_window": _WINDOW}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_SHAPE,
            "head_dim": 8,
            "sliding_window": _WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_SHAPE, "num_key_value_heads": 4}),
    "mixtral": ("MixtralConfig", {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_SHAPE, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gemma2": (
        "Gemma2Config",
        {
            **_SHAPE,
            "head_dim": 8,
            "sliding_window": _WINDOW,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi": ("PhiConfig", {**_SHAPE, "num_key_value_heads": 4}),  # its head has a bias
    "phi3": ("Phi3Config", _SHAPE),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "falcon": ("FalconConfig", {**_SHAPE, "alibi": False}),
    "granite": ("GraniteConfig", {**_SHAPE, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "olmo2": ("Olmo2Config", _SHAPE),
    "cohere2": (
        "Cohere2Config",
        {
            **_SHAPE,
            "head_dim": 8,
            "sliding_window": _WINDOW,
            "logit_scale": 0.5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "starcoder2": ("Starcoder2Config", {**_SHAPE, "sliding_window": _WINDOW}),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_SHAPE,
            "head_dim": 8,
            "sliding_window": _WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "smollm3": ("SmolLM3Config", {**_SHAPE, "no_rope_layers": [1, 0]}),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "lfm2": ("Lfm2Config", {**_SHAPE, "layer_types": ["conv", "full_attention"]}),
    "jamba": (
        "JambaConfig",
        {
            **_SHAPE,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
# Families that cannot be a tree: state along the row, or attention outside transformers' interface.
FALLBACK = ("falcon", "mamba2", "lfm2", "jamba", "bloom")


def tiny_model(family: str = "llama", *, seed: int = 0, dropout: bool = False, **changes: object) -> PreTrainedModel:
    """A float32 model of one of the families in `CONFIGS`, with weights large enough that differences show."""
    name, fields = CONFIGS[family]
    config = getattr(transformers, name)(**{**fields, **changes})
    if not dropout:
        rates = (
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "attention_dropout",
            "hidden_dropout",
            "dropout",
            "layerdrop",
        )
        for rate in rates:
            if hasattr(config, rate):
                setattr(config, rate, 0.0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
            elif parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def ragged_examples(count: int = 3, *, completions: int = 2, longest: int = 20, seed: int = 0) -> list[Example]:
    """Prompts and completions of uneven lengths, with single-token ones among them."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    def length() -> int:
        return int(torch.randint(1, longest + 1, (), generator=generator))

    examples = [Example.of(ids(length()), [ids(length()) for _ in range(completions)], i) for i in range(count)]
    short = Example.of(ids(1), [ids(1), *(ids(longest) for _ in range(completions - 1))], count)
    return [*examples, short]


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(*, chat: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained here on a few words; ChatML unless `chat` is False."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the film was good and the film was bad", "I liked it, I did not like it"] * 5, trainer
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=CHATML if chat else None,
    )


def pair_rows(count: int = 12) -> list[dict[str, str]]:
    """Text pairs of uneven lengths."""
    words = ["good", "bad", "a long and winding", "not what I liked", "fine", "dull, as the last one was", "it"]
    return [
        {
            "prompt": f"The film number {i} was" + " really" * (i % 4),
            "chosen": " " + " and ".join(words[(i + k) % 7] for k in range(1 + i % 3)),
            "rejected": " " + " or ".join(words[(i + 3 + k) % 7] for k in range(1 + (i + 1) % 4)),
        }
        for i in range(count)
    ]
