"""Tiny tokenizers, trained in memory, and small rows; nothing is downloaded."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "The sky is blue because the air scatters light. The sea is green and the grass is greener.",
    "Hello there, who are you? I am a small model and I am glad to help.",
    "2 + 2 = 4, and 4 - 2 = 2. system user assistant",
] * 4


# Templates that end a turn in a token (Llama 3), in no token at all, and that render a prompt otherwise alone (Gemma 4)
HEADERS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
THINKING = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think></think>' }}")
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


def byte_level(*, special: tuple[str, ...] = (), **tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the given special tokens; it adds none by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(dict.fromkeys([*special, *tokens.values()])),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def chat_tokenizer(template: str | None = CHATML, **tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template; ends are `<|im_end|>` unless given."""
    tokenizer = byte_level(special=("<|im_start|>", "<|im_end|>"), **(tokens or {"eos_token": "<|im_end|>"}))
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def metaspace(*, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that writes `▁` before every text and adds `<s>`, and `</s>` where asked."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted({*"▁\n", *"".join(TEXTS)} - {" "})
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, max_token_length=8, show_progress=False
    )
    tokenizer.train_from_iterator([word for text in TEXTS for word in text.split()], trainer)
    single = "<s> $A </s>" if adds_eos else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def pair(
    prompt: object = "The sky is", chosen: object = " blue.", rejected: object = " green.", **more: object
) -> dict:
    """One row, right unless told otherwise."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chat(question: str = "Who are you?", good: str = "I am a model.", bad: str = "I am the sea.") -> dict:
    """One conversational row."""
    return pair([user(question)], [assistant(good)], [assistant(bad)])
