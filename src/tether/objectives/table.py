"""The one table of objectives: the command line, the documentation, the error messages and the tests read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite

from torch import Tensor

from tether.objectives import pairwise
from tether.types import Kind


@dataclass(frozen=True)
class Objective:
    """One row: a loss, what it needs, and which options apply to it.

    Args:
        name: what users write.
        function: log-ratios `[B]` twice and its options, to a loss `[B]`.
        kind: the kind of preference it learns from.
        options: option name to `(lowest, highest, whether the lowest itself is allowed)`.
        convention: what its options mean, printed at the start of a run.
    """

    name: str
    function: Callable[..., Tensor]
    kind: Kind
    options: dict[str, tuple[float, float, bool]]
    convention: str


OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective(
            name="sigmoid",
            function=pairwise.sigmoid,
            kind="pair",
            options={"beta": (0.0, float("inf"), False), "label_smoothing": (0.0, 0.5, True)},
            convention="log-probs summed over completion tokens; beta per nat; label_smoothing is the chance of "
            "a wrong label",
        ),
    )
}


def check_options(name: str, options: dict[str, float]) -> str | None:
    """What is wrong with an objective's name or options, as a sentence; None when nothing is.

    >>> check_options("sigmoid", {"beta": 0.1}) is None
    True
    >>> check_options("sigmoud", {})
    "loss 'sigmoud' is not known; did you mean sigmoid? Known are: sigmoid."
    """
    if name not in OBJECTIVES:
        near = get_close_matches(name, OBJECTIVES, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        return f"loss {name!r} is not known{hint} Known are: {', '.join(sorted(OBJECTIVES))}."
    allowed = OBJECTIVES[name].options
    for option, value in options.items():
        if option not in allowed:
            return f"{option} does not apply to loss {name!r}; it takes {', '.join(allowed)}."
        low, high, inclusive = allowed[option]
        if not (low <= value < high) or (value == low and not inclusive):
            bound = f"{'at least' if inclusive else 'above'} {low:g}" + (
                f" and below {high:g}" if isfinite(high) else ""
            )
            return f"{option} is {value}; for loss {name!r} it must be {bound}."
    return None
