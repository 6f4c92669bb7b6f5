"""The tables of other tools' keys: what each becomes here, and why. The data stands in `tables/`, a line a group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, cast, get_args

from tether.config.foreign.document import parse_foreign

Mark = Literal["same", "convertible", "note", "ask", "refused"]
MARKS: tuple[Mark, ...] = get_args(Mark)
_COLUMNS = ("keys", "mark", "target", "rule", "default", "idle", "reason")


@dataclass(frozen=True)
class Row:
    """What becomes of one key of another tool.

    Args:
        key: its name; `datasets[].path` for a key of an entry of `datasets`.
        mark: `same`: the same thing exists; `convertible`: a rule says it; `note`: it needs nothing here; `ask`: only
            the user can tell; `refused`: it cannot be done.
        target: dotted keys of the run file that it sets, with blanks between them; empty: none.
        rule: name of the function that sets them.
        default: what the tool takes where the key is left out, of a `same` key whose default is another one here.
        idle: values that ask for nothing; with them the key is a note, whatever its mark.
        reason: why, or what to do.
    """

    key: str
    mark: Mark
    target: str = ""
    rule: str = ""
    default: Any = None
    idle: tuple[Any, ...] = ()
    reason: str = ""

    @property
    def targets(self) -> list[str]:
        """Keys of the run file that it sets."""
        return self.target.split()

    def is_idle(self, value: Any) -> bool:
        """Whether a value asks for nothing; `0` is not `false`."""
        return any(type(value) is type(one) and value == one for one in self.idle)


@cache
def load_table(name: str) -> dict[str, Row]:
    """The rows of a table by key, in the order of the file.

    Args:
        name: of the file in `tables/`, without its ending.

    Raises:
        ValueError: a line is malformed, or a key stands in two lines.
    """
    text = resources.files("tether.config.foreign").joinpath("tables", f"{name}.tsv").read_text(encoding="utf-8")
    header, *lines = text.splitlines()
    if tuple(header.split("\t")) != _COLUMNS:
        raise ValueError(f"{name}.tsv: its first line must be {' '.join(_COLUMNS)}")
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, 2):
        cells = line.split("\t")
        if len(cells) != len(_COLUMNS) or cells[1] not in MARKS:
            raise ValueError(f"{name}.tsv, line {number}: {len(cells)} cells, mark {cells[1:2]}")
        keys, mark, target, rule, default, idle, reason = cells
        for key in keys.split():
            if key in rows:
                raise ValueError(f"{name}.tsv, line {number}: `{key}` stands in an earlier line too")
            values = parse_foreign(f"[{idle}]", name)
            made = target.replace("*", key)
            rows[key] = Row(key, mark, made, rule, parse_foreign(default, name), tuple(values), reason)  # type: ignore[arg-type]
    return rows


Use = Literal["use", "fallback", "own", "refused"]


@dataclass(frozen=True)
class Template:
    """What becomes of a chat template that a tool has a name for.

    Args:
        template: the name that the same one has in `tether.models.chat_template.LIBRARY`; empty: none.
        use: `use`: it takes the place of the model's own; `fallback`: it is taken where the model has none; `own`: the
            model's own is that one; `refused`: it cannot be had.
        reason: what differs, or what to do.
    """

    template: str
    use: Use
    reason: str = ""


@cache
def load_templates(tool: str) -> dict[str, Template]:
    """The chat templates of a tool, by its names of them.

    Args:
        tool: as `templates.tsv` has it.
    """
    path = resources.files("tether.config.foreign").joinpath("tables", "templates.tsv")
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {
        name: Template(template, cast(Use, use), reason)
        for owner, names, template, use, reason in lines
        if owner == tool
        for name in names.split()
    }
