"""Another chat template for a tokenizer or processor: by name, a file, text, or that of another tokenizer."""

from __future__ import annotations

import logging
import re
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.errors import ConfigError
from tether.models.load import load_tokenizer

logger = logging.getLogger("tether")
# Control tokens as templates spell them: <|im_start|>, [INST], <start_of_turn>.
_CONTROLS = re.compile(r"<[|\uff5c][^\s<>|{}]{1,40}[|\uff5c]>|<[a-z]+_of_[a-z]+>|\[/?[A-Z_]{2,20}\]")
_SHOWN = 4
# Templates of `templates/`, by name.
LIBRARY = (
    "alpaca",
    "chatml",
    "cohere",
    "deepseek_v2",
    "exaone",
    "falcon_h1",
    "gemma",
    "gemma3",
    "llama3",
    "mistral_v1",
    "mistral_v2v3",
    "mistral_v3_tekken",
    "phi3",
    "phi3_older",
    "qwen2_vl",
    "qwen25",
    "qwen3",
    "zephyr",
)
# Before a source: it is taken only where the tokenizer has no template.
FALLBACK = "fallback:"


def use_chat_template(processing: PreTrainedTokenizerBase | ProcessorMixin, source: str | Path) -> None:
    """Write conversations with another chat template from now on.

    Args:
        processing: a tokenizer or a processor; changed in place, so that it is saved with the template.
        source: a name of `LIBRARY`, a file of the template, its text, or the name or folder of a tokenizer that has
            one; after `fallback:` it is taken only where there is no template yet.

    Raises:
        ConfigError: there is no template.
    """
    tokenizer: Any = getattr(processing, "tokenizer", processing)
    if str(source).startswith(FALLBACK):
        if tokenizer.chat_template or getattr(processing, "chat_template", None):
            return
        source = str(source).removeprefix(FALLBACK).strip()
    template = _template_of(source)
    tokenizer.chat_template = template
    if processing is not tokenizer:
        processing.chat_template = template  # type: ignore[union-attr]
    known = tokenizer.get_vocab()
    texts = template.values() if isinstance(template, dict) else [template]
    strange = sorted({found for text in texts for found in _CONTROLS.findall(text)} - known.keys())
    if strange:
        shown = ", ".join(strange[:_SHOWN]) + (f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else "")
        logger.warning(
            f"chat template: {shown} of '{source}' are no tokens of the model's tokenizer, which writes each in "
            "several. Add them with `add_tokens` where each is to be one."
        )


def _template_of(source: str | Path) -> str | dict[str, str]:
    if source in LIBRARY:
        return resources.files("tether.models").joinpath("templates", f"{source}.jinja").read_text(encoding="utf-8")
    if "{%" in str(source) or "{{" in str(source):
        return str(source)
    path = Path(source).expanduser()
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ConfigError(f"chat_template: '{source}' is empty; it must hold a template.")
        return text
    if path.suffix == ".jinja":
        raise ConfigError(f"chat_template: there is no file '{source}', looked for from {Path.cwd()}. Correct it.")
    template = load_tokenizer(source).chat_template
    if not template:
        raise ConfigError(
            f"chat_template: the tokenizer '{source}' has none. Name one that has, such as that of the model's "
            f"instruction-tuned variant or one of {', '.join(LIBRARY)}, or give a file (.jinja)."
        )
    return template
