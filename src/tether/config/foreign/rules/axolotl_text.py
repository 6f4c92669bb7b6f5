"""Axolotl's keys of text: chat templates, special tokens, the default system message."""

from __future__ import annotations

from pathlib import Path

from tether.config.foreign.draft import Draft, Source
from tether.config.foreign.table import load_templates
from tether.models.spec import SPECIAL_TOKENS


def text(draft: Draft, source: Source) -> None:
    """`special_tokens`, `default_system_message`, `chat_template`, its keywords and `chat_template_jinja`."""
    _tokens(draft, source)
    if source.has("default_system_message"):
        draft.set("data.system", source.text("default_system_message"), "default_system_message")
    if source.has("chat_template_kwargs"):
        draft.set("data.chat_template_kwargs", source.mapping("chat_template_kwargs"), "chat_template_kwargs")
    _template(draft, source, "chat_template", source.text("chat_template") or _of_sets(source))


def _of_sets(source: Source) -> str | None:
    """The template that all data sets name, where the file names none for them together."""
    entries = source.get("datasets")
    names = [one.get("chat_template") for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    return names[0] if names and isinstance(names[0], str) and names.count(names[0]) == len(names) else None


def _tokens(draft: Draft, source: Source) -> None:
    """`special_tokens`: those of a row's ends; nothing is padded, so that a new token for it would only be dead."""
    given = {name: token for name, token in source.mapping("special_tokens").items() if token}
    more = given.pop("additional_special_tokens", [])
    pad = given.pop("pad_token", None)
    for name, token in given.items():
        if name not in SPECIAL_TOKENS or not isinstance(token, str):
            source.wrong(("special_tokens", name), token, f"text, under one of {', '.join(SPECIAL_TOKENS)}")
    if given:
        draft.set("model.special_tokens", given, "special_tokens")
    if more:
        if not isinstance(more, list) or not all(isinstance(token, str) for token in more):
            source.wrong(("special_tokens", "additional_special_tokens"), more, "a list of tokens")
        if "tokens" in source.values:
            source.refuse(
                "special_tokens", "`special_tokens.additional_special_tokens` go in `tokens`. Put them there."
            )
        draft.set("model.add_tokens", more, "special_tokens")
    if pad and (given or more):
        draft.explain("special_tokens", f"pad_token {pad!r} is left out: nothing is padded")
    elif pad:
        draft.note("special_tokens", "nothing is padded; the tokenizer is saved as it is")


def _template(draft: Draft, source: Source, key: str, name: str | None) -> None:
    given = source.text("chat_template_jinja")
    if given is not None:
        if "{" not in given and not Path(given).expanduser().is_file():
            source.refuse(
                "chat_template_jinja", "`chat_template_jinja` is neither a template nor the name of a file. Correct it."
            )
        draft.set("model.chat_template", given, "chat_template_jinja")
        draft.note(key, "chat_template_jinja says it")
        return
    if name is None:
        return
    known = load_templates("axolotl")
    bare = name.removeprefix("tokenizer_default_fallback_")
    found = known.get(bare)
    if found is None and (bare != name or not name.startswith("tokenizer_default")):
        source.refuse(
            key,
            f"`{key}` is {name!r}; known are {', '.join(known)}. Where it is the model's own template, say "
            f"{key}=tokenizer_default; else write it to a file, and say {key}=jinja chat_template_jinja=FILE.",
        )
    if found is None:
        draft.note(key, "conversations are written by the model's own template; a model without one is refused")
        return
    if found.use == "refused":
        source.refuse(key, f"`{key}` is {name!r}: {found.reason}.")
    draft.set("model.chat_template", found.template if bare == name else f"fallback:{found.template}", key)
    draft.explain(key, found.reason)
