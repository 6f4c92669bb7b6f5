"""Axolotl's `datasets`: what each entry becomes as a source of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tether.config.foreign.draft import Draft, Fate, Source
from tether.config.foreign.rules import shared
from tether.config.foreign.rules.axolotl_online import KINDS
from tether.config.foreign.table import load_table
from tether.data.rows.formats import FORMAT_NAMES
from tether.data.sources.files import READERS, kind_of_file

# Names of readers that Axolotl takes for `path`, with the files in `data_files`.
_READERS = ("json", "jsonl", "csv", "parquet", "arrow")
# What `message_property_mappings` and `roles` may say without renaming anything.
_PROPERTIES = {"role": ("role", "from"), "content": ("content", "value")}
_ROLES = {
    "user": {"user", "human"},
    "assistant": {"assistant", "gpt", "model", "bot", "chatgpt"},
    "system": {"system"},
    "tool": {"tool", "observation"},
}
_OWN_FIELDS = {
    "field_prompt": "prompt",
    "field_system": "system",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "completion",
    "field_label": "label",
}
# Of supervised rows.
_INSTRUCTED = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "completion",
    "field_system": "system",
}
_MAPPINGS = ("message_property_mappings", "roles")
_NAMES = ("chat_template", "chat_template_jinja", "message_field_role", "message_field_content")
_ALPACA = ("alpaca", "alpaca.load")
_FORMATS = ("prompt_format", "chosen_format", "rejected_format", "completion_format")
_DROPPED_UNDER_RL = ("message_property_mappings", "roles", "chat_template", "name", "ds_type", "trust_remote_code")


def data(draft: Draft, source: Source) -> None:
    """`datasets`, `test_datasets`, `val_set_size` and where prepared rows are kept."""
    if not source.has("datasets"):
        source.refuse("datasets", "`datasets` is missing. Name the rows.")
    draft.set("data.train", _sources(draft, source, "datasets"), "datasets")
    if source.flag("streaming"):
        shared.read_whole(draft, "streaming")
    _turns(draft, source)
    share = source.number("val_set_size")
    if source.has("test_datasets"):
        draft.set("data.eval", _sources(draft, source, "test_datasets"), "test_datasets")
        draft.note("val_set_size", "test_datasets are evaluated")
    elif share:
        draft.set("data.eval", {"split": share}, "val_set_size")
    if source.flag("dataset_exact_deduplication"):
        draft.set("data.deduplicate", True, "dataset_exact_deduplication")
    if source.has("dataset_prepared_path"):
        draft.set("data.cache", source.text("dataset_prepared_path"), "dataset_prepared_path")
    if not source.flag("shuffle_merged_datasets", True):
        draft.set("train.train_sampling_strategy", "sequential", "shuffle_merged_datasets")


def _turns(draft: Draft, source: Source) -> None:
    """Which turns are trained on, and what a conversation begins with; text has neither."""
    texts = {_is_text(entry) for entry in source.get("datasets")}
    if texts == {True} and draft.get("data.system") is not None:
        del draft.values["data"]["system"]
        del draft.origins["data", "system"]
        draft.note("default_system_message", "the rows are text, which has no messages", "does not read it for them")
    if draft.get("train.turns") is None or texts == {False}:
        return
    if len(texts) > 1:
        source.refuse("datasets", "`datasets` has conversations beside text. Train on one of them at a time.")
    del draft.values["train"]["turns"]
    del draft.origins["train", "turns"]


def _sources(draft: Draft, source: Source, key: str) -> Any:
    entries = source.get(key)
    if not isinstance(entries, list) or not entries or not all(isinstance(one, dict) for one in entries):
        source.wrong(key, entries, "a list of mappings, each with `path` and `type`")
    made = [_entry(draft, source, (key, index), entry) for index, entry in enumerate(entries)]
    return made if len(made) > 1 else made[0]


def _entry(draft: Draft, source: Source, place: tuple[str, int], entry: dict[str, Any]) -> Any:
    given = {name: value for name, value in entry.items() if value is not None}
    rows = load_table("axolotl")
    for name, value in given.items():
        row = rows.get(f"datasets[].{name}")
        if row is None:
            source.refuse(
                (*place, name), f"`{name}` of a data set is no key that Axolotl's own examples have. Take it out."
            )
        if row.mark == "refused" and not row.is_idle(value):
            source.refuse((*place, name), f"`{name}` of a data set is {value!r}; {row.reason}.")
        shown = f"{place[0]}[{place[1]}].{name}"
        under_rl = source.get("rl") in ("dpo", "ipo", "kto", "simpo") and name in _DROPPED_UNDER_RL
        there = f"drops it under rl: {source.get('rl')}" if under_rl else ""
        mark = "note" if row.is_idle(value) else row.mark
        became = ["data.train" if place[0] == "datasets" else "data.eval"] if row.target and mark != "note" else []
        draft.fates[shown] = Fate(shown, value, mark, became, row.reason, there)
    if "path" not in given and "data_files" in given:
        given["path"] = given.pop("data_files")
    if "path" not in given:
        source.refuse(place, "`path` of a data set is missing.")
    _check_kinds(source, place, given)
    _check_messages(draft, source, place, given)
    found: dict[str, Any] = _place_of_rows(given)
    found |= {name: given[name] for name in ("name", "revision") if name in given}
    found |= {"split": str(given["split"])} if given.get("split", "train") != "train" else {}
    found |= _labels(given)
    found |= _layout(draft, source, place, given)
    return found["path"] if found.keys() == {"path"} else found


def _place_of_rows(given: dict[str, Any]) -> dict[str, Any]:
    path, files = given["path"], given.get("data_files")
    if files is None:
        return {"path": path}
    if path in _READERS:
        return {"path": files}
    if kind_of_file(Path(str(path))) in READERS:  # a file, beside which Axolotl does not read the others
        return {"path": path}
    folder = Path(str(path)).expanduser()
    if not folder.is_dir():
        return {"path": path, "data_files": files}
    names = [str(Path(path) / name) for name in ([files] if isinstance(files, str) else files)]
    return {"path": names[0] if len(names) == 1 else names}


def _check_kinds(source: Source, place: tuple[str, int], given: dict[str, Any]) -> None:
    """What is read here of a data set is what it must be."""
    for name in _MAPPINGS:
        value = given.get(name, {})
        if not isinstance(value, dict):
            source.wrong((*place, name), value, "a mapping")
        for key, one in value.items():
            source.listed((*place, name, key), one)
    for name in _NAMES:
        if not isinstance(given.get(name, ""), str):
            source.wrong((*place, name), given[name], "text")
    source.listed((*place, "roles_to_train"), given.get("roles_to_train"))


def _check_messages(draft: Draft, source: Source, place: tuple[str, int], given: dict[str, Any]) -> None:
    """Names of roles and of their keys; those that are known are found from the rows."""
    mappings = {
        "role": given.get("message_field_role"),
        "content": given.get("message_field_content"),
        **(given.get("message_property_mappings") or {}),
    }
    for name, column in mappings.items():
        if column is not None and name not in _PROPERTIES and column != name:
            source.refuse(
                place,
                f"messages have {name!r} under {column!r}; role and content alone may have other names.",
            )
    template = given.get("chat_template")
    common = {source.get("chat_template")} | {one.get("chat_template") for one in source.get("datasets", ())}
    if template is not None and not str(template).startswith("tokenizer_default") and common - {template, None}:
        source.refuse(
            (*place, "chat_template"),
            f"`chat_template` of a data set is {template!r}, and not that of all: one template writes all. "
            "Give all sets the same.",
        )
    if "chat_template_jinja" in given:
        source.refuse(
            (*place, "chat_template_jinja"),
            "one template writes all rows. Say it at the top of the file, chat_template: jinja and this.",
        )
    trained = given.get("roles_to_train", ["assistant"])
    if [trained] if isinstance(trained, str) else [one for one in trained if one not in ("assistant", "gpt")]:
        source.wrong((*place, "roles_to_train"), trained, "[assistant]")
    for name, known in (("train_on_eos", ("turn", "all")), ("train_on_eot", ("turn", "all"))):
        if name in given and given[name] not in known:
            source.wrong((*place, name), given[name], " or ".join(known))


def _labels(given: dict[str, Any]) -> dict[str, Any]:
    """`roles` and `message_keys` of a source: what is not found by itself."""
    roles: dict[str, str] = {}
    for role, names in (given.get("roles") or {}).items():
        listed = [names] if isinstance(names, str) else list(names or ())
        roles |= {one: role for one in listed if one not in _ROLES.get(role, {role})}
    named = {"role": given.get("message_field_role"), "content": given.get("message_field_content")}
    named |= given.get("message_property_mappings") or {}
    keys = {name: column for name, column in named.items() if column and column not in _PROPERTIES.get(name, (column,))}
    return {**({"roles": roles} if roles else {}), **({"message_keys": keys} if keys else {})}


def _layout(draft: Draft, source: Source, place: tuple[str, int], given: dict[str, Any]) -> dict[str, Any]:
    """`format`, `fields` and patterns, from `type` and the names of columns."""
    kind, loss = given.get("type"), draft.get("objective.loss")
    names = {name: given[f"field_{name}"] for name in ("messages", "chosen", "rejected") if f"field_{name}" in given}
    if isinstance(kind, dict):
        return _instructed(source, place, kind) if loss == "sft" else _patterns(source, place, kind)
    if loss == "sft":
        return _supervised(source, place, given, names)
    fields = {"fields": {name: column for name, column in names.items() if column != name}} if names else {}
    fields = {name: value for name, value in fields.items() if value}
    if kind is None:
        return fields
    if not isinstance(kind, str):
        source.wrong((*place, "type"), kind, "the name of a type, or a mapping")
    known = kind in FORMAT_NAMES or f"{kind}.default" in FORMAT_NAMES
    if (source.get("rl") in KINDS or not known) and (function := shared.beside(source, kind)) is not None:
        return {"transform": function, **fields}
    found = "chatml.icr" if kind.startswith("bradley_terry") else kind
    found = found if found in FORMAT_NAMES else f"{found}.default"
    if found not in FORMAT_NAMES:
        source.refuse(
            (*place, "type"),
            f"`type` is {kind!r}; known are {', '.join(FORMAT_NAMES)}, and module.function of a Python file that "
            "lies beside this one.",
        )
    if (family := found.partition(".")[0]) in ("chatml", "llama3"):
        shown = f"{place[0]}[{place[1]}].type"
        draft.explain(
            shown, "rows become messages, written by the model's own template, and as the type has it by none"
        )
        if draft.get("model.chat_template") is None and not source.has("chat_template"):
            draft.set("model.chat_template", f"fallback:{family}", comment=f"type: {kind}")
    return {"format": found.removesuffix(".default") if found.startswith("passthrough") else found, **fields}


def _patterns(source: Source, place: tuple[str, int], kind: dict[str, Any]) -> dict[str, Any]:
    for name in kind.keys() - _OWN_FIELDS.keys() - set(_FORMATS):
        if kind[name] is not None:
            known = ", ".join((*_OWN_FIELDS, *_FORMATS))
            source.refuse((*place, "type", name), f"`type.{name}` of a data set is not read; known are {known}.")
    fields = {ours: kind[theirs] for theirs, ours in _OWN_FIELDS.items() if kind.get(theirs) not in (None, ours)}
    patterns = {name: kind[name] for name in _FORMATS if kind.get(name)}
    return {"format": "user_defined", **({"fields": fields} if fields else {}), **patterns}


def _supervised(source: Source, place: tuple[str, int], given: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    kind = given.get("type")
    if kind == "completion":
        column = given.get("field", "text")
        return {"fields": {"text": column}} if column != "text" else {}
    if kind in _ALPACA:
        return {"format": "alpaca_text"}
    if kind not in ("chat_template", None):
        source.refuse(
            (*place, "type"),
            f"`type` is {kind!r}, which writes a prompt of Axolotl's own around a row; known are chat_template, alpaca "
            "and completion, and a mapping with `format`. Write the rows as messages.",
        )
    column = names.get("messages", "messages")
    mappings = given.get("message_property_mappings") or {}
    older = "from" in (given.get("message_field_role"), mappings.get("role")) or column == "conversations"
    if older:
        return {"format": "sharegpt", **({"fields": {"conversations": column}} if column != "conversations" else {})}
    return {"fields": {"messages": column}} if column != "messages" else {}


def _is_text(entry: dict[str, Any]) -> bool:
    """Whether a set of supervised rows is text around which no turns are written."""
    kind = entry.get("type")
    return isinstance(kind, dict) or kind == "completion" or kind in _ALPACA


def _instructed(source: Source, place: tuple[str, int], kind: dict[str, Any]) -> dict[str, Any]:
    """Rows of an instruction and an output, with a pattern around them."""
    given = {name: value for name, value in kind.items() if value not in (None, "")}
    for name in given.keys() - _INSTRUCTED.keys() - {"format", "no_input_format", "system_prompt", "system_format"}:
        known = ", ".join((*_INSTRUCTED, "format", "no_input_format", "system_prompt", "system_format"))
        source.refuse((*place, "type", name), f"`type.{name}` of a data set is not read; known are {known}.")
    pattern, bare = given.get("format", "{instruction} {input} "), given.get("no_input_format")
    if "field_input" not in given:
        pattern = bare or pattern
    elif bare is not None and bare != pattern:
        source.refuse(
            (*place, "type", "no_input_format"),
            "`type.no_input_format` of a data set is of rows without an input, and a run file has one pattern for all. "
            "Take it out, or write the rows as messages.",
        )
    system = given.get("system_format", "{system}")
    if "field_system" not in given:
        said = str(given.get("system_prompt", "")).replace("{", "{{").replace("}", "}}")
        system = system.replace("{system}", said) if said else ""
    fields = {ours: given[theirs] for theirs, ours in _INSTRUCTED.items() if given.get(theirs, ours) != ours}
    fields |= {} if "completion" in fields else {"completion": "output"}
    return {"format": "user_defined", "fields": fields, "prompt_format": system + pattern}
