"""A reward model as a reward: a sequence classifier with one label and its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from tether.data.text.template_sandbox import ending_template
from tether.errors import ConfigError
from tether.models.load import check_source, ensure_pad_token
from tether.rewards.builtin import text_of


class ModelReward:
    """What a model that classifies sequences says of prompt and completion, at their last real token.

    Args:
        model: with one label; a name or folder is loaded.
        tokenizer: its own; left out, it is loaded from the model's source.

    Raises:
        ConfigError: several labels.
    """

    def __init__(self, model: str | nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        if isinstance(model, str):
            check_source(model, classifies=True)
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, use_safetensors=True)
        else:
            loaded = model
        labels = getattr(loaded.config, "num_labels", 1)
        if labels != 1:
            raise ConfigError(f"The reward model has {labels} labels; expected one, whose logit is the reward.")
        self._model = loaded.eval()
        source = loaded.config.name_or_path
        self._tokenizer = AutoTokenizer.from_pretrained(source) if tokenizer is None else tokenizer
        ensure_pad_token(self._tokenizer)
        loaded.config.pad_token_id = self._tokenizer.pad_token_id
        self.__name__ = str(source).rstrip("/").split("/")[-1] or type(loaded).__name__

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        texts = [self._joined(prompt, one) for prompt, one in zip(prompts, completions, strict=True)]
        inputs = self._tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        ).to(self._model.device)
        with torch.no_grad():
            return self._model(**inputs).logits[:, 0].float().tolist()

    def _joined(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + text_of(completion)
        with ending_template():
            return str(self._tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
