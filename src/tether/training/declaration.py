"""How a field of a configuration is declared: once, with its default, its text, what is allowed and its run-file key.

Docstrings, checks, the run file and its JSON schema follow from that. Fields for the options of an objective come from
the registry.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from dataclasses import dataclass
from typing import Any, ClassVar

from tether.errors import ConfigError
from tether.objectives import OBJECTIVES, Algorithm, Objective, Range, check_options, options_of, unknown_loss
from tether.training.surface.retired import Configuration

# Stands for the default of a field that the registry declares; the annotation beside it is for type checkers.
REGISTERED: Any = object()


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `low` on.

    >>> 3 in Whole(2, "tokens"), True in Whole(1), Whole(2, "tokens").words
    (True, False, 'a whole number from 2 tokens')
    """

    low: int
    unit: str = ""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= self.low

    @property
    def words(self) -> str:
        """What is allowed, to follow "must be"."""
        return f"a whole number from {self.low} {self.unit}".rstrip()


Alternative = Range | Whole | str | float | None


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, made anew where it has a factory; `dataclasses.MISSING` where it has none."""
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()  # pyright: ignore[reportCallIssue]


class Text(str):
    """A field's text, which `transformers.HfArgumentParser` shows as help, with what else is declared.

    `allowed` holds the values that the field may have: constants and bounds; empty: what its type says. `key` is the
    dotted key of the run file.
    """

    allowed: tuple[Alternative, ...]
    key: str

    def __new__(cls, text: str, allowed: tuple[Alternative, ...] = (), key: str = "") -> Text:
        made = super().__new__(cls, text)
        made.allowed, made.key = allowed, key
        return made

    def problem(self, value: Any) -> str | None:
        """What is allowed in place of a value, as words that follow the field's name; None where it may stand."""
        if not self.allowed or any(_is(value, one) for one in self.allowed):
            return None
        return f"is {value!r}; {self.words}"

    @property
    def words(self) -> str:
        """What is allowed, as the end of a sentence."""
        return f"it must be {self.listed()}." if self._bounded else f"allowed are {', '.join(map(str, self.allowed))}."

    @property
    def _bounded(self) -> bool:
        return any(isinstance(one, (Range, Whole)) for one in self.allowed)

    def listed(self, none: str = "None") -> str:
        """What is allowed, with what None is called."""
        words = [none if one is None else _words(one, quoted=self._bounded) for one in self.allowed]
        return _either(words)


def losses_of(algorithm: Algorithm) -> str:
    """The losses of an algorithm, for the text of its `loss_type`."""
    return _either([f"`{name}`" for name in OBJECTIVES[algorithm]])


def _either(words: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _words(one: Range | Whole | str | float, *, quoted: bool) -> str:
    if not isinstance(one, (Range, Whole)):
        return f"`{one}`" if quoted else str(one)
    return f"a number {one.words}" if isinstance(one, Range) else one.words


def _is(value: Any, one: Alternative) -> bool:
    if isinstance(one, Range):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value in one
    return value in one if isinstance(one, Whole) else value == one


def option(default: Any, text: str, *, allowed: tuple[Alternative, ...] = (), key: str = "") -> Any:
    """A field of a configuration.

    Args:
        default: its value where none is given.
        text: what it does, for docstring, schema and command line.
        allowed: see `Text`.
        key: of the run file; left out: under `objective` for what one algorithm alone has, else under `train`.
    """
    metadata = {"help": Text(text, allowed, key)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def refused(kept: Any, reason: str) -> Any:
    """A field that TRL has and that would do nothing here: it must stay as it is, for a reason."""
    return option(kept, f"Stays {kept!r}: {reason}.", allowed=(kept,))


class Declared(metaclass=Configuration):
    """Base of configurations; a subclass that names its algorithm gets a field for each option in the registry."""

    algorithm: ClassVar[Algorithm | None] = None
    # What a run file calls it in place of a loss, where it is not the ordinary configuration of its losses.
    preset: ClassVar[str | None] = None

    def __init_subclass__(cls, algorithm: Algorithm | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        annotations = inspect.get_annotations(cls)
        if algorithm:
            cls.algorithm = algorithm
            for name, one in options_of(algorithm).items():
                annotations.setdefault(name, "float" if one.default is not None else "float | None")
                text = f"{one.text} Must be {one.allowed.words}."
                unset = (None,) if one.default is None else ()
                setattr(cls, name, option(one.default, text, allowed=(*unset, one.allowed)))
            cls.__annotations__ = annotations
        inherited = getattr(cls, "__dataclass_fields__", {})
        told = {}
        for name in annotations:
            value = cls.__dict__.get(name)
            if name in inherited and not isinstance(value, dataclasses.Field):  # another default of the same field
                setattr(cls, name, dataclasses.field(default=value, metadata=inherited[name].metadata))
            elif isinstance(value, dataclasses.Field):
                told[name] = value.metadata["help"]
                told[name].key = told[name].key or f"{'objective' if algorithm else 'train'}.{name}"
            elif value is REGISTERED:
                raise TypeError(f"{cls.__name__}.{name}: the registry has no such option of {algorithm}.")
        if told:
            cls.__doc__ = _with_arguments(inspect.cleandoc(cls.__doc__ or ""), told)

    def check_declared(self) -> None:
        """Refuse a value that its field's declaration does not allow.

        Raises:
            ConfigError: with the field.
        """
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            text = field.metadata.get("help")
            if isinstance(text, Text) and (problem := text.problem(getattr(self, field.name))):
                raise ConfigError(problem, field.name)

    @property
    def objective_rows(self) -> tuple[Objective, ...]:
        """The rows of the registry that are trained.

        Raises:
            ConfigError: there is none of a name.
        """
        assert self.algorithm is not None
        rows = OBJECTIVES[self.algorithm]
        names = getattr(self, "loss_type", next(iter(rows)))
        names = [names] if isinstance(names, str) else names
        for name in names:
            if name not in rows:
                raise ConfigError(unknown_loss(self.algorithm, name), "loss_type")
        return tuple(rows[name] for name in names)

    def given_options(self) -> dict[str, float | None]:
        """Values of the options that the rows take, and of others that were changed."""
        assert self.algorithm is not None
        taken = {option.name for row in self.objective_rows for option in (*row.options, *row.around)}
        values = {name: (getattr(self, name), one.default) for name, one in options_of(self.algorithm).items()}
        return {name: value for name, (value, default) in values.items() if name in taken or value != default}

    def check_objective(self) -> None:
        """Refuse an unknown loss, and options that it does not take or that are outside their bounds.

        Raises:
            ConfigError: with the field.
        """
        if problem := check_options(self.objective_rows, self.given_options()):
            raise ConfigError(problem.words, problem.field)


def _with_arguments(doc: str, told: dict[str, Text]) -> str:
    """A docstring with a section `Args`, before what it raises."""
    front, mark, raises = doc.partition("\n\nRaises:")
    lines = [
        textwrap.fill(f"{name}: {text}", width=112, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for name, text in told.items()
    ]
    return "\n".join([front, "", "Args:", *lines]) + mark + raises + "\n"


def keywords(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A mapping that may be given as JSON text, as on a command line.

    Raises:
        ConfigError: no JSON object.
    """
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError as error:
        raise ConfigError(f"is {value!r}, which is not JSON ({error}); pass a dictionary.", name) from error
    if not isinstance(found, dict):
        raise ConfigError(f"is {value!r}; it must be a JSON object, or a dictionary.", name)
    return found


def read_number(options: Any, name: str) -> Any:
    """The value of an option that is a number; a text that says one, as YAML gives `1e-3`, is made the number.

    Raises:
        ConfigError: a text that says none.
    """
    value = getattr(options, name)
    if not isinstance(value, str):
        return value
    try:
        setattr(options, name, int(value) if value.strip().isdecimal() else float(value))
    except ValueError as error:
        raise ConfigError(f"is {value!r}, which is not a number.", name) from error
    return getattr(options, name)
