"""Another chat template for a tokenizer or processor: by name, a file, text, or that of another tokenizer."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
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
_FOLDER = resources.files("tether.models").joinpath("templates")
# Families whose turns differ in the words around them alone, as `written_by` reads them.
TURNS: dict[str, dict[str, Any]] = json.loads(_FOLDER.joinpath("turns.json").read_text(encoding="utf-8"))
_FILES = [entry.name.removesuffix(".jinja") for entry in _FOLDER.iterdir() if entry.name.endswith(".jinja")]
# Templates that are here, by name.
LIBRARY = tuple(sorted([*_FILES, *TURNS]))
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
    if source in TURNS:
        return written_by(TURNS[str(source)])
    if source in LIBRARY:
        return _FOLDER.joinpath(f"{source}.jinja").read_text(encoding="utf-8")
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


def written_by(turns: Mapping[str, Any]) -> str:
    """The template of a family.

    Args:
        turns: texts with `{}` for what a message says, `{bos}` and `{eos}` for these tokens. `system`, `user` and
            `answer` are messages, `open` is what stands before an answer, `before` and `after` stand around a
            conversation. `system_in_user` is a system message that stands inside the next turn of a user, and
            `default_system` one for conversations without. `image` stands for an image; `trim`: without blanks around
            what is said; `after_thought`: an answer is what follows this text; `like`: the rest is of another family.
    """
    if "like" in turns:
        return written_by({**TURNS[turns["like"]], **{key: value for key, value in turns.items() if key != "like"}})
    said = "ns.text | trim" if turns.get("trim") else "ns.text"
    answer = f"({said}).split({_quoted(turns['after_thought'])})[-1]" if "after_thought" in turns else said
    image = turns.get("image")
    seen = _quoted(image) if image else _refusal("this template writes no images; name the processor of a model")
    inside = turns.get("system_in_user")
    system = (
        f"{{% set ns.head = {_expression(inside, said)} %}}"
        if inside
        else f"{{{{ {_expression(turns['system'], said)} }}}}"
    )
    default = turns.get("default_system")
    parts = [
        "{% if tools %}{{ "
        + _refusal("this template writes no tools; name the tokenizer of the model, whose own one does")
        + " }}{% endif %}",
        f"{{{{ {_expression(turns.get('before', ''))} }}}}{{% set ns = namespace(head='', text='') %}}",
        ""
        if default is None
        else f"{{% if messages[0]['role'] != 'system' %}}{{% set ns.text = {_quoted(default)} %}}{system}{{% endif %}}",
        "{% for message in messages %}{% set ns.text = '' %}",
        "{% if message['content'] is string %}{% set ns.text = message['content'] %}{% else %}",
        "{% for part in message['content'] %}"
        f"{{% set ns.text = ns.text + (({seen}) if part['type'] == 'image' else part['text']) %}}"
        "{% endfor %}{% endif %}",
        f"{{% if message['role'] == 'system' %}}{system}",
        f"{{% elif message['role'] == 'user' %}}{{{{ {_expression(turns['user'], f'ns.head + ({said})')} }}}}"
        "{% set ns.head = '' %}",
        f"{{% elif message['role'] == 'assistant' %}}"
        f"{{{{ {_expression(turns.get('open', '') + turns['answer'], answer)} }}}}",
        "{% else %}{{ " + _refusal("this template has places for system, user and assistant alone") + " }}",
        "{% endif %}{% endfor %}",
        f"{{% if add_generation_prompt %}}{{{{ {_expression(turns.get('open', ''))} }}}}"
        f"{{% else %}}{{{{ {_expression(turns.get('after', ''))} }}}}{{% endif %}}",
    ]
    return "".join(parts)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refusal(problem: str) -> str:
    return f"raise_exception({_quoted(problem)})"


def _expression(text: str, said: str = "''") -> str:
    """A text with blanks for tokens and for what is said, as Jinja adds it up."""
    blanks = {"{}": f"({said})", "{bos}": "(bos_token or '')", "{eos}": "(eos_token or '')"}
    pieces = [piece for piece in re.split(r"(\{\}|\{bos\}|\{eos\})", text) if piece]
    return " + ".join(blanks.get(piece) or _quoted(piece) for piece in pieces) or "''"
