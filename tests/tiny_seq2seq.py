"""Tiny random encoder-decoder models and their tokenizers; nothing is downloaded."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from tiny import VOCABULARY, tiny_tokenizer

_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
SEQ2SEQ = {
    "t5_tied": ("T5Config", {**_T5, "tie_word_embeddings": True}),
    "t5_untied_gated": ("T5Config", {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "bart": (
        "BartConfig",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
    ),
}


def tiny_seq2seq(
    family: str, *, seed: int = 0, vocab_size: int = VOCABULARY, dropout: float = 0.0, **changes: object
) -> PreTrainedModel:
    """A float32 model of one of the families in `SEQ2SEQ`, with weights and a bias of the logits that show."""
    name, fields = SEQ2SEQ[family]
    rates = {"dropout_rate": dropout} if name == "T5Config" else {"dropout": dropout}
    # T5 without tied embeddings begins with large weights in its head.
    scale = {"bart": 3.0, "t5_tied": 1.2}.get(family, 0.7)
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**{**fields, **rates, "vocab_size": vocab_size, **changes})
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def tiny_seq2seq_tokenizer(family: str) -> PreTrainedTokenizerBase:
    """T5: bytes, `text </s>`, no file needed. BART: byte-level BPE, `<s> text </s>`."""
    if family.startswith("t5"):
        return transformers.ByT5Tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(chat=False)
    ends = [("<s>", tokenizer.bos_token_id), ("<|im_end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A <|im_end|>", special_tokens=ends)
    return tokenizer
