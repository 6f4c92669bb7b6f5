"""Tiny random models, built from configs; nothing is downloaded."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tether.types import Example

VOCABULARY = 97
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
}


def tiny_model(family: str = "llama", *, seed: int = 0, dropout: bool = False, **changes: object) -> PreTrainedModel:
    """A float32 model of one of the families in `CONFIGS`, with weights large enough that differences show."""
    name, fields = CONFIGS[family]
    config = getattr(transformers, name)(**{**fields, **changes})
    if not dropout:
        for attribute in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout"):
            if hasattr(config, attribute):
                setattr(config, attribute, 0.0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
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
