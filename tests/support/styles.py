"""Tokenizers of each style, and chat templates of known families with what ends their turns."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data.samples import CHATML, TEXTS, byte_level, metaspace

SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>"),
    *("<think>", "</think>"),
]
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] +"
    " ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Thoughts of earlier turns are left out; an answer without one gets an empty one, unless it is asked for with thoughts.
QWEN3 = (
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if message['role'] == 'assistant' %}{% if '</think>' in text %}"
    "{% if not loop.last %}{% set text = text.split('</think>')[1].lstrip('\n') %}{% endif %}"
    "{% elif loop.last %}{% set text = '<think>\n\n</think>\n\n' + text %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
ENDS = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, None),
    "gemma": (GEMMA, "<end_of_turn>"),
    "zephyr": (ZEPHYR, None),
    "qwen3": (QWEN3, "<|im_end|>"),
}


def bpe() -> PreTrainedTokenizerFast:
    return byte_level(special=tuple(SPECIAL), bos_token="<s>", eos_token="</s>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """BPE with a dummy prefix, as Llama 2 and Mistral have."""
    tokenizer = metaspace()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    """Unigram over Metaspace with a dummy prefix, as Gemma's and T5's kind."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *SPECIAL]
    trainer = trainers.UnigramTrainer(
        vocab_size=250,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=sorted({*"".join(TEXTS), "\n"} - {" "}),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


def wordpiece() -> PreTrainedTokenizerFast:
    """WordPiece in lower case, as BERT has: it does not keep every character."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "<s>", "</s>", *SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


def bytes_alone() -> PreTrainedTokenizerBase:
    """Bytes without merges, in Python; it adds `</s>` after every text by itself."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL, "bos_token": "<s>"})
    return tokenizer


STYLES = {
    "byte-level BPE": bpe,
    "SentencePiece BPE": sentencepiece,
    "unigram": unigram,
    "WordPiece": wordpiece,
    "bytes": bytes_alone,
}
