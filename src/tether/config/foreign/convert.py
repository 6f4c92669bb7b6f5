"""From a file of TRL, Axolotl or LLaMA-Factory to a checked run, with what became of every key."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tether.config.document import KeyPath
from tether.config.fields import keys_of
from tether.config.foreign.document import Document, parse_foreign, read_foreign
from tether.config.foreign.draft import OWN, Draft, Fate, Source, as_number
from tether.config.foreign.rules import axolotl, llamafactory, llamafactory_v1, trl
from tether.config.foreign.table import Row, load_table
from tether.config.problems import show
from tether.config.read import check_run
from tether.config.run import RunConfig
from tether.config.words import branches, field_types
from tether.errors import ConfigError
from tether.redact import HIDDEN, is_secret
from tether.training import PreferenceConfig
from tether.training.surface.retired import RETIRED

Rule = Callable[[Draft, Source], None]
_SHOWN = 6
_VARIABLE = re.compile(r"[^\s{}$]*\$\{[\w.:,-]+\}[^\s{}$]*")
# Keys whose value is never printed.
SECRETS = (
    "comet_api_key",
    "hf_hub_token",
    "hub_token",
    "ms_hub_token",
    "om_hub_token",
    "push_to_hub_token",
    "swanlab_api_key",
    "swanlab_lark_secret",
    "swanlab_lark_webhook_url",
)


# Of files with `model_name_or_path`, LLaMA-Factory's have one of these; those to export and to chat have no stage.
_OF_LLAMAFACTORY = {"stage", "finetuning_type", "template", "infer_backend", "export_dir", "dataset_dir", "task"}
# Keys that LLaMA-Factory's v1 layout alone has; `model` at the top is a run file's too.
_OF_V1 = {
    *("model_class", "train_dataset", "init_config", "peft_config", "kernel_config", "quant_config", "dist_config"),
    *("optim_config", "lr_scheduler_config", "batching_strategy", "global_batch_size", "sample_backend"),
}


@dataclass(frozen=True)
class Tool:
    """Another tool, and how its files are read.

    Args:
        name: as it calls itself.
        tables: its keys; an earlier table wins.
        rules: by name, in the order in which they are applied.
        config: the configuration whose fields are keys of the file too; None: none is.
        only_transformers: of these fields those alone that are transformers' own.
        ignores_unknown: it reads keys that it does not have, and does nothing with them.
        doubled_is_error: it stops at a key that is given twice; the others take the last.
    """

    name: str
    tables: tuple[str, ...]
    rules: Mapping[str, Rule]
    config: Callable[[Source], type[PreferenceConfig]] | None = None
    only_transformers: bool = False
    ignores_unknown: bool = False
    doubled_is_error: bool = False

    def rows(self) -> dict[str, Row]:
        """Its keys."""
        return {key: row for table in reversed(self.tables) for key, row in load_table(table).items()}


TOOLS: dict[str, Tool] = {
    "axolotl": Tool("Axolotl", ("axolotl",), axolotl.RULES, ignores_unknown=True),
    "llamafactory": Tool(
        "LLaMA-Factory",
        ("llamafactory", "transformers"),
        llamafactory.RULES,
        config=llamafactory.configuration,
        only_transformers=True,
        doubled_is_error=True,
    ),
    "llamafactory_v1": Tool(
        "LLaMA-Factory",
        ("llamafactory_v1",),
        llamafactory_v1.RULES,
        doubled_is_error=True,
    ),
    "trl": Tool("TRL", ("trl", "transformers"), trl.RULES, config=trl.configuration),
}


@dataclass(frozen=True)
class Conversion:
    """What a foreign file became.

    Args:
        tool: whose file it is.
        path: the file.
        values: the run file, without defaults.
        run: the same, checked.
        fates: what became of each key.
        comments: by dotted key of the run file.
        defaults: what the tool sets where the file says nothing, by dotted key, with why.
        resume: a checkpoint that the file names.
        processes: how many the file asks for.
    """

    tool: Tool
    path: Path
    values: dict[str, Any]
    run: RunConfig
    fates: list[Fate]
    comments: dict[str, str]
    defaults: dict[str, str]
    resume: str | None
    processes: int = 1


def detect(values: Mapping[str, Any]) -> str | None:
    """Which tool a file is of: a key of `TOOLS`; None for a run file of our own."""
    if "base_model" in values:
        return "axolotl"
    if "model" in values and not isinstance(values["model"], dict) and _OF_V1 & values.keys():
        return "llamafactory_v1"
    if "model_name_or_path" not in values:
        return None
    return "llamafactory" if _OF_LLAMAFACTORY & values.keys() else "trl"


def is_foreign(path: Path) -> bool:
    """Whether a file is one of another tool; a file that is not there, or no mapping, is not."""
    try:
        return detect(read_foreign(path).values) is not None
    except ConfigError:
        return False


def convert_file(path: str | Path, overrides: Sequence[str] = (), command: str | None = None) -> Conversion:
    """Convert a file of another tool.

    Args:
        path: the file.
        overrides: `key=value` in the file's own words; `tether.train.seed=1` sets a key of the run file.
        command: the tool's command, such as `dpo`, of a file of TRL or of LLaMA-Factory's v1; None: guessed from the
            keys.

    Raises:
        ConfigError: a key that cannot be converted, or about which the user must decide.
    """
    document = read_foreign(Path(path).expanduser())
    given: dict[KeyPath, str] = {}
    for override in overrides:
        _apply(document, override, given)
    tool = detect(document.values) or ("trl" if command else None)
    if command and tool in ("axolotl", "llamafactory"):
        raise ConfigError(
            f"--as was given, and {path} is a file of {TOOLS[tool].name}, which says itself what it trains. Leave --as "
            "out."
        )
    if tool is None:
        raise ConfigError(
            f"{path} is not a file of TRL, Axolotl or LLaMA-Factory: it has neither `base_model` nor "
            "`model_name_or_path`. A run file is trained as it is."
        )
    return convert_document(TOOLS[tool], document, given, command)


def from_flags(command: str, path: Path | None, flags: Mapping[str, Any]) -> Conversion:
    """Convert what TRL's command line says.

    Args:
        command: such as `dpo`.
        path: of the YAML file; None: there is none.
        flags: by name, over those of the file.

    Raises:
        ConfigError: see `convert_file`.
    """
    document = read_foreign(path) if path is not None else Document(Path(f"tether {command}"), {})
    if (tool := detect(document.values)) not in (None, "trl"):
        raise ConfigError(
            f"{path} is a file of {TOOLS[str(tool)].name}, and this is TRL's command. Say tether train {path}."
        )
    given: dict[KeyPath, str] = {}
    for name, value in flags.items():
        set_value(document, name.split("."), value, f"--{name}", given)
    return convert_document(TOOLS["trl"], document, given, command)


def convert_document(
    tool: Tool, document: Document, given: Mapping[KeyPath, str] | None = None, command: str | None = None
) -> Conversion:
    """Convert what was read; see `convert_file`."""
    source = Source(tool.name, document, given)
    source.command = command or ""
    config = tool.config(source) if tool.config else None
    draft, rows = Draft(source), tool.rows()
    _mark(draft, rows, tool, config)
    for key, lines in document.doubled.items():
        if tool.doubled_is_error:
            source.refuse(key, f"`{key}` was given before, on line {lines[0]}. Keep one of the two.")
        draft.explain(key, f"given twice; the last one counts, not line {', '.join(map(str, lines))}")
    for row in rows.values():
        if row.mark == "same" and row.default is not None and not source.has(row.key):
            draft.set(row.target, row.default, comment=f"{tool.name}'s default")
    for rule in tool.rules.values():
        rule(draft, source)
    for fate in draft.fates.values():
        if fate.mark == "convertible" and not fate.became and "[" not in fate.key:
            if fate.reason == rows[fate.key].reason:
                fate.reason = "what it belongs to is not asked for"
            fate.mark = "note"
    _add_own(draft, source)
    values = _in_order(draft.values)
    run = check_run(values, draft.place)
    fates = list(draft.fates.values())
    unsaid = {".".join(map(str, path)): key for path, key in draft.origins.items() if not key}
    defaults = {target: draft.comments.get(target, "") for target in unsaid}
    return Conversion(tool, source.path, values, run, fates, draft.comments, defaults, draft.resume, draft.processes)


def _mark(draft: Draft, rows: Mapping[str, Row], tool: Tool, config: type[PreferenceConfig] | None) -> None:
    """A fate for every key; keys that are the same are set, and those that stop the conversion are said together."""
    source, stops = draft.source, []
    automatic = keys_of(config) if config else {}
    if tool.only_transformers:
        automatic = {name: automatic[name] for name in automatic.keys() & TrainingArguments.__dataclass_fields__.keys()}
    for key, value in source.values.items():
        if key == OWN:
            continue
        row = rows.get(key)
        if key in automatic and (row is None or automatic[key].startswith("rollout.")):
            row = Row(key, "same", automatic[key])
        row = row or _retired(key, automatic)
        if row is None:
            stops += _unknown(draft, tool, key, value, [*rows, *automatic])
            continue
        secret = key in SECRETS and value is not None
        fate = draft.fates[key] = Fate(key, HIDDEN if secret else value, row.mark, reason=row.reason)
        if (variable := _unfilled(value)) is not None:
            stops.append(
                f"{source.place(key)}: `{key}` has `{variable}`, and variables are not filled in. Write the value, or "
                f"give it after the file: {key}=…"
            )
        elif value is None:
            fate.mark, fate.reason = "note", "empty"
        elif row.is_idle(value):
            fate.mark, fate.reason = "note", row.reason if row.mark == "note" else "it asks for nothing"
        elif row.mark in ("ask", "refused"):
            said = "given" if secret else show(value)
            stops.append(f"{source.place(key)}: `{key}` is {said}; {row.reason}.")
        elif row.mark == "same":
            typed = _as_typed(value, row.target)
            of_list = config is not None and key in automatic and _is_list(field_types(config)[key])
            draft.set(row.target, [typed] if of_list and not isinstance(typed, list) else typed, key)
    if stops:
        more = len(stops) - _SHOWN
        raise ConfigError(" ".join(stops[:_SHOWN]) + (f" There are {more} more." if more > 0 else ""))


def _unfilled(value: Any) -> str | None:
    """A variable in a value, such as `${HOME}/out`; text with blanks around one is a template."""
    if isinstance(value, (list, dict)):
        inside = value.values() if isinstance(value, dict) else value
        return next((found for one in inside if (found := _unfilled(one)) is not None), None)
    return value if isinstance(value, str) and _VARIABLE.fullmatch(value) else None


def _retired(key: str, automatic: Mapping[str, str]) -> Row | None:
    """What becomes of a name that TRL or transformers had, in files that are older; None for another name."""
    old = RETIRED.get(key) if automatic else None
    if old is None:
        return None
    if old.becomes is not None and old.becomes in automatic:
        return Row(key, "same", automatic[old.becomes], reason=f"it is called {old.becomes} now")
    if old.never_matters:
        return Row(key, "note", reason="it has no effect any more, and none is needed")
    return Row(key, "refused", idle=(old.harmless,), reason=f"there is no such option any more: {old.advice}")


def _unknown(draft: Draft, tool: Tool, key: str, value: Any, known: Iterable[str]) -> list[str]:
    """What is said of a key that the tool does not have; empty where that stops nothing."""
    # Where an unknown key is ignored, one that is only a little alike may be left to itself.
    cutoff = 0.8 if tool.ignores_unknown else 0.7
    near = difflib.get_close_matches(str(key), [one for one in known if "." not in one], n=1, cutoff=cutoff)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    place = draft.source.place(key)
    if value is None and tool.ignores_unknown:
        draft.fates[key] = Fate(key, value, "note", reason="empty", there="has no such key")
        return []
    if not tool.ignores_unknown:
        return [f"{place}: `{key}` is not a key of {tool.name}.{hint or ' Remove it.'}"]
    if near:
        return [f"{place}: {tool.name} has no key `{key}` and ignores it.{hint} Correct it, or remove it."]
    draft.fates[key] = Fate(key, shown(key, value), "note", reason="no such key", there="ignores it")
    return []


def shown(key: Any, value: Any) -> Any:
    """The value of an unknown key as the table may show it: without secrets, by the names of their keys."""
    if isinstance(value, dict):
        return {name: shown(name, one) for name, one in value.items()}
    return HIDDEN if value is not None and (key in SECRETS or is_secret(str(key))) else value


def _as_typed(value: Any, target: str) -> Any:
    """A value as the tools' parsers give it: numbers in quotes are numbers, and `no` of a strategy is its name."""
    if value is False and target.endswith("_strategy"):
        return "no"
    if not isinstance(value, str) or (number := as_number(value)) is None:
        return value
    fields = {key: name for name, key in keys_of(PreferenceConfig).items()}
    hint = field_types(PreferenceConfig).get(fields.get(target, ""), float)
    takes_text = target.partition(".")[0] not in ("train", "objective") or str in branches(hint)
    return value if takes_text else number


def _is_list(hint: Any) -> bool:
    """Whether an option takes a list and no single value, so that one value of a command line is a list of one."""
    kinds = [typing.get_origin(kind) or kind for kind in branches(hint)]
    return list in kinds and not {str, int, float, dict, bool} & set(kinds)


def _add_own(draft: Draft, source: Source) -> None:
    """Keys of the run file that the foreign file, or an override, says itself."""

    def add(section: dict[str, Any], path: tuple[str, ...]) -> None:
        if "reference" in section and not path:
            draft.values.pop("reference", None)  # parts of two declarations would contradict each other
        for name, value in section.items():
            here = (*path, str(name))
            target = ".".join(here)
            if isinstance(value, dict) and isinstance(draft.get(target), dict):
                add(value, here)
                continue
            draft.set(target, value)
            draft.origins[here] = f"{OWN}.{target}"
            draft.comments.pop(target, None)

    add(source.mapping(OWN), ())


def _in_order(values: dict[str, Any]) -> dict[str, Any]:
    """Sections in the order in which a run file has them."""
    known = [name for name in RunConfig.model_fields if name in values]
    return {name: values[name] for name in [*known, *(values.keys() - set(known))]}


def _apply(document: Document, override: str, given: dict[KeyPath, str]) -> None:
    """Set a key, in the file's own words."""
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"The argument '{override}' is not an override. Allowed is key=value with a key of the file, such as "
            "learning_rate=1e-5."
        )
    said = f"{name.strip()}={HIDDEN}" if parts[0] in SECRETS else override
    set_value(document, parts, parse_foreign(text, f"override '{said}'"), said, given)


def set_value(document: Document, parts: Sequence[str], value: Any, said: str, given: dict[KeyPath, str]) -> None:
    """Set a key of a file, by its path, as it was said on the command line.

    Raises:
        ConfigError: the path goes through something that has no keys.
    """
    section: Any = document.values
    path: KeyPath = ()
    for part, last in zip(parts, [*[False] * (len(parts) - 1), True], strict=True):
        step: Any = int(part) if isinstance(section, list) and part.isdigit() else part
        inside = isinstance(section, dict) or (isinstance(section, list) and step in range(len(section)))
        if not inside:
            raise ConfigError(f"The argument '{said}' names `{'.'.join(parts)}`, and nothing there has keys.")
        path = (*path, step)
        if last:
            section[step] = value
        elif isinstance(section, dict) and section.get(part) is None:
            section[part] = {}
        section = section[step]
    given[path] = said
    if len(parts) == 1:
        document.doubled.pop(parts[0], None)
