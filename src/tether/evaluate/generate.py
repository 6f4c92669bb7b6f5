"""Sample continuations of prompts in batches: the same seed gives the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tether.errors import ConfigError
from tether.models.load import ensure_pad_token
from tether.models.structure import evaluation_mode, own_generation_settings_away, transformers_model
from tether.progress import each


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 32,
    seed: int = 0,
    add_special_tokens: bool = True,
) -> list[str]:
    """Continue each prompt once. The model's modes and the random state are afterwards as they were before.

    Args:
        model: the policy, with or without adapters; it samples with the adapters that are active.
        tokenizer: its tokenizer.
        prompts: texts, none of them empty; a chat is rendered before, and then needs `add_special_tokens=False`.
        max_new_tokens: most tokens of a continuation.
        temperature: 0 takes the most likely token each time, without chance.
        top_p: sample from the smallest set of tokens that holds this share of the probability.
        top_k: sample from that many most likely tokens; 0 for all. Cheaper than `top_p`, which sorts the vocabulary.
        batch_size: prompts at once.
        seed: of the sampling. The texts also depend on `batch_size`, as a batch draws together.
        add_special_tokens: whether the tokenizer adds its own, such as one that begins a text.

    Returns:
        The continuations, without special tokens, in the order of the prompts.

    Raises:
        ConfigError: an empty prompt, or a sampling value out of its range.
    """
    _check(prompts, max_new_tokens, temperature, top_p, top_k, batch_size)
    ensure_pad_token(tokenizer)
    base = transformers_model(model)
    config = _config(base, tokenizer, max_new_tokens, temperature, top_p, top_k)
    ids = tokenizer(list(prompts), add_special_tokens=add_special_tokens)["input_ids"] if prompts else []
    # Prompts of like length share a batch, so that little is padded; the longest first, so that memory fails early.
    order = sorted(range(len(prompts)), key=lambda index: -len(ids[index]))
    texts = [""] * len(prompts)
    sampler: Any = model
    devices = [base.device] if base.device.type == "cuda" else []
    modes = evaluation_mode(model), own_generation_settings_away(model, base)
    with torch.random.fork_rng(devices), modes[0], modes[1], torch.inference_mode():
        torch.manual_seed(seed)
        for start in each(range(0, len(order), batch_size), "sampling"):
            rows = order[start : start + batch_size]
            batch = _left_padded([ids[row] for row in rows], config.pad_token_id)
            # A decoder of its own returns what it wrote, behind its start token; any other repeats the prompt.
            width = 0 if base.config.is_encoder_decoder else batch["input_ids"].shape[1]
            batch = {name: tensor.to(base.device) for name, tensor in batch.items()}
            sampled = sampler.generate(**batch, generation_config=config)
            decoded = tokenizer.batch_decode(sampled[:, width:], skip_special_tokens=True)
            for row, text in zip(rows, decoded, strict=True):
                texts[row] = text
    return texts


def _check(
    prompts: Sequence[str], max_new_tokens: int, temperature: float, top_p: float, top_k: int, batch_size: int
) -> None:
    if isinstance(prompts, str):
        raise ConfigError("prompts is one text. Allowed is a list of texts: put it in a list.")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"Prompt {index} is empty. A continuation needs at least one token: remove the prompt.")
    for name, value, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("batch_size", batch_size, batch_size >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
        ("top_k", top_k, top_k >= 0),
    ):
        if not allowed:
            raise ConfigError(
                f"{name} is {value}. Allowed: max_new_tokens and batch_size from 1, temperature and top_k from 0, "
                "top_p above 0 and at most 1. Choose a value in its range."
            )


def _config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
) -> GenerationConfig:
    """All settings that change the samples, so that none comes from the checkpoint's own generation settings."""
    ends: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = list(ends) if isinstance(ends, list) else [ends]
    ends.append(tokenizer.eos_token_id)
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {}
    starts = ("decoder_start_token_id", "bos_token_id")  # what a decoder of its own begins with
    own = [(name, getattr(model.generation_config, name, None), getattr(model.config, name, None)) for name in starts]
    sampling |= {name: one if one is not None else other for name, one, other in own if (one, other) != (None, None)}
    return GenerationConfig(
        do_sample=temperature > 0,
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        num_beams=1,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(set(ends) - {None}) or None,
        **sampling,
    )


def _left_padded(ids: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """A batch whose rows end together, and the mask that says which tokens are real: the padding id may be one."""
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
    }
