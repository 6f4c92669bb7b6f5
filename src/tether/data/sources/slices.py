"""Parts of a data set and of its rows: `train`, `train[:10%]`, `train[100:200]+test`, as `datasets` has them.

Called by `load` and `stream`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tether.errors import ConfigError

_PIECE = re.compile(r"(?P<part>[^\[\]+:%]+)(?:\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Slice:
    """Rows of one part.

    Args:
        part: its name.
        first: place of the first row: a number, from the end where it is negative, or a share such as `10%`; "": 0.
        last: place of the row after the last one, in the same way; "": all.
    """

    part: str
    first: str = ""
    last: str = ""

    @property
    def whole(self) -> bool:
        """Whether it is all rows of the part."""
        return not self.first and not self.last

    @cached_property
    def fixed(self) -> tuple[int, int | None] | None:
        """First and last place where they need no count of rows; None where they do."""
        if any("%" in bound or "-" in bound for bound in (self.first, self.last)):
            return None
        return int(self.first or 0), int(self.last) if self.last else None

    def places(self, count: int) -> range:
        """The rows, of `count` that the part has, by their places.

        Example:
            >>> Slice("train", "50%").places(5), Slice("train", "-2").places(5)
            (range(2, 5), range(3, 5))
        """
        first, last = (_place(bound, count, end) for bound, end in ((self.first, 0), (self.last, count)))
        return range(count)[first:last]


def _place(bound: str, count: int, end: int) -> int:
    if not bound:
        return end
    if not bound.endswith("%"):
        return int(bound)
    share = int(bound[:-1])
    return round((share if share >= 0 else 100 + share) * count / 100)


def slices_of(split: str, name: str) -> Sequence[Slice]:
    """What a split says.

    Args:
        split: one part or several with `+` between them, each with or without bounds.
        name: what to call the rows in messages.

    Raises:
        ConfigError: it cannot be read.

    Example:
        >>> slices_of("train[:10%]+test", "train")
        (Slice(part='train', first='', last='10%'), Slice(part='test', first='', last=''))
    """
    found = [_PIECE.fullmatch(piece.strip()) for piece in split.split("+")]
    if not all(found):
        raise ConfigError(
            f"{name}: split is {split!r}; expected a part, such as train, with or without bounds: train[:1000], "
            "train[10%:20%], train[-100:], train+test."
        )
    return tuple(Slice(one["part"], one["first"] or "", one["last"] or "") for one in found if one)


def shares_of(counts: Sequence[int], fractions: Sequence[float], repeat: bool = False) -> list[int]:
    """How many rows of each source are taken so that they have these shares, as many as there can be without repeats.

    Args:
        counts: rows that each source has.
        fractions: their shares, from 0; what they sum to does not matter.
        repeat: as few as there can be so that every row of every source is one of them.

    Example:
        >>> shares_of([100, 30], [0.5, 0.5]), shares_of([100, 30], [3, 1])
        ([30, 30], [90, 30])
        >>> shares_of([100, 30], [0.5, 0.5], repeat=True)
        [100, 100]
    """
    whole = math.fsum(fractions)
    bound = max if repeat else min
    total = bound(count * whole / part for count, part in zip(counts, fractions, strict=True) if part > 0)
    return [round(total * fraction / whole) for fraction in fractions]
