"""A reward model as a reward: a sequence classifier with one label and its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from tether.data.text.template_sandbox import ending_template
from tether.errors import ConfigError
from tether.models.load import check_source, ensure_pad_token
from tether.rewards.builtin import READY_MADE, text_of

# Texts that are scored at once.
_ROWS = 16


class ModelReward:
    """What a model that classifies sequences says of prompt and completion, at their last real token.

    Args:
        model: with one label; a name or folder is loaded.
        tokenizer: its own; left out, it is loaded from the model's source.

    Raises:
        ConfigError: there is no such model, or it has several labels.
    """

    def __init__(self, model: str | nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        loaded: Any = _loaded(model) if isinstance(model, str) else model
        labels = getattr(loaded.config, "num_labels", 1)
        if labels != 1:
            raise ConfigError(f"The reward model has {labels} labels; expected one, whose logit is the reward.")
        self._model = loaded.eval()
        source = loaded.config.name_or_path
        self._tokenizer = AutoTokenizer.from_pretrained(source) if tokenizer is None else tokenizer
        ensure_pad_token(self._tokenizer)
        loaded.config.pad_token_id = self._tokenizer.pad_token_id
        self.__name__ = str(source).rstrip("/").split("/")[-1] or type(loaded).__name__

    def to(self, device: torch.device) -> None:
        """Move the model; a run gives it the policy's device."""
        self._model.to(device)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        texts = [self._joined(prompt, one) for prompt, one in zip(prompts, completions, strict=True)]
        found: list[float] = []
        for start in range(0, len(texts), _ROWS):
            inputs = self._tokenizer(
                texts[start : start + _ROWS],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            ).to(self._model.device)
            with torch.no_grad():
                found += self._model(**inputs).logits[:, 0].float().tolist()
        return found

    def _joined(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + text_of(completion)
        with ending_template():
            return str(self._tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))


def _loaded(name: str) -> Any:
    """A classifier by its name or folder.

    Raises:
        ConfigError: there is none; a name that is close to a ready-made reward's is said.
    """
    check_source(name, classifies=True)
    try:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, use_safetensors=True)
    except OSError as error:
        near = get_close_matches(name, READY_MADE, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"The reward {name!r} is none of the ready-made ones, {', '.join(READY_MADE)}{hint}, and no model of that "
            f"name can be loaded: {str(error).splitlines()[0]} A function of your own is file.py:name."
        ) from error
