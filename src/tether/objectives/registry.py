"""The one registry of objectives: configurations, run files, schema, documentation and tests are derived from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import get_args

from tether.objectives.objective import Algorithm, Objective, Option, Problem
from tether.objectives.rows import ROWS

# Algorithm to name to row.
OBJECTIVES: dict[Algorithm, dict[str, Objective]] = {
    algorithm: {row.name: row for row in ROWS if row.algorithm == algorithm} for algorithm in get_args(Algorithm)
}


def run_file_row(key: str) -> Objective | None:
    """The row that a run file means by a name alone: of two algorithms that have it, the one made for it.

    >>> run_file_row("simpo").algorithm, run_file_row("ipo").algorithm
    ('cpo', 'dpo')
    """
    rows = [row for algorithm in OBJECTIVES.values() for row in algorithm.values()]
    found = [row for row in rows if row.run_file_key == key]
    return found[-1] if found else None


def options_of(algorithm: Algorithm) -> dict[str, Option]:
    """Every option of an algorithm's rows by name: the fields that its configuration has.

    >>> options_of("kto")["desirable_weight"].default
    1.0
    """
    found: dict[str, Option] = {}
    for row in OBJECTIVES[algorithm].values():
        for option in (*row.options, *row.around):
            found.setdefault(option.name, option)
    return found


# What papers and other tools call an objective whose name here is another; a likeness in spelling would mislead.
FIELD_NAMES = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid",
    "dpo_pair": "sigmoid",
    "conservative_dpo": "sigmoid",
    "logistic": "sigmoid",
    "slic": "hinge",
    "slic_hf": "hinge",
    "robust_dpo": "robust",
    "dpo_positive": "dpop",
    "smaug": "dpop",
    "bco": "bco_pair",
    "nll": "sft",
    "sppo": "sppo_hard",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "apo": "apo_zero",
}


def unknown_loss(algorithm: Algorithm, name: str) -> str:
    """Words that follow `loss_type`, with the nearest name that exists.

    >>> unknown_loss("sft", "nlll")
    "'nlll' is not known; did you mean nll? Allowed are nll, dft."
    """
    plain = re.sub("_loss$|(?<=oid)al$", "", name.lower().replace("-", "_"))
    said, names = FIELD_NAMES.get(plain, plain), OBJECTIVES[algorithm]
    near = [said] if said in names else [one for one in names if _is_slip(plain, one)]
    hint = f"did you mean {' or '.join(near)}? Allowed" if near else "allowed"
    return f"{name!r} is not known; {hint} are {', '.join(OBJECTIVES[algorithm])}."


def _is_slip(name: str, meant: str) -> bool:
    """Whether a name can only be a slip of another: a letter twice, two exchanged, in a long one a letter that is
    wrong, missing or too many. Names of objectives are short and alike, so that nearness alone would lead to another
    objective: `wpo` is not `rpo`, `kto_pair` not `exo_pair`.
    """
    shorter, longer = sorted((name, meant), key=len)
    if len(longer) - len(shorter) == 1:
        more = next(place for place in range(len(longer)) if longer[: place + 1] != shorter[: place + 1])
        sure = len(shorter) > 4 or longer[more].isdigit() or longer[more] == longer[more - 1]
        return longer[:more] + longer[more + 1 :] == shorter and sure
    if len(longer) != len(shorter):
        return False
    apart = [place for place in range(len(name)) if name[place] != meant[place]]
    if len(apart) == 2 and apart[1] == apart[0] + 1:
        return sorted(name[apart[0] : apart[1] + 1]) == sorted(meant[apart[0] : apart[1] + 1])
    return len(apart) == 1 and len(name) > 5


def check_options(rows: Sequence[Objective], options: Mapping[str, float | None]) -> Problem | None:
    """What is wrong with options that go to the rows that take them; None when nothing is.

    Args:
        rows: of one algorithm, at least one.
        options: by name.

    Returns:
        The first problem: an option that no row takes, or one outside the bounds of a row that does.
    """
    names = ", ".join(row.name for row in rows)
    listed = repr(names) if len(rows) == 1 else names
    for name, value in options.items():
        taken = [(row, option) for row in rows for option in (*row.options, *row.around) if option.name == name]
        if not taken:
            known = dict.fromkeys(option.name for row in rows for option in (*row.options, *row.around))
            takes = f"it takes {', '.join(known)}" if known else "it takes no options"
            return Problem(name, f"does not apply to loss {listed}; {takes}.")
        for row, option in taken:
            if value is None and option.default is None:
                continue
            if value is None or value not in option.allowed:
                return Problem(name, f"is {value}; for loss {row.name!r} it must be {option.allowed.words}.")
    return None
