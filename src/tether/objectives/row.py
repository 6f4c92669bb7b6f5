"""What a row of the table of objectives is.

A row adds to a function what its code does not say: the kind of preference it learns from, the allowed values of its
options, when to use it. What the code does say is read from it: the names of its positional parameters are the numbers
that it takes (`chosen_logratios`, `chosen_mean_logps`, `margins`), those of its keyword parameters are its options with
their defaults, and its docstring cites the paper and says what beta means.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Literal

from torch import Tensor

from tether.types import Kind

Level = Literal["sum", "mean"]
Averaged = Literal["examples", "tokens", "micro_batch"]


@dataclass(frozen=True)
class Range:
    """Values an option may have: from `low` to `high`, either of which may be left out of it.

    Example:
        >>> Range(0, 0.5).words, 0.5 in Range(0, 0.5)
        ('at least 0 and below 0.5', False)
    """

    low: float
    high: float = inf
    low_included: bool = True
    high_included: bool = False

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.low_included else value > self.low
        return above and (value <= self.high if self.high_included else value < self.high)

    @property
    def words(self) -> str:
        """What is allowed, to follow "must be"."""
        low = f"{'at least' if self.low_included else 'above'} {self.low:g}"
        high = f" and {'at most' if self.high_included else 'below'} {self.high:g}" if isfinite(self.high) else ""
        return low + high if isfinite(self.low) else "any number" + high


_OPTIONAL = inspect.Parameter("margins", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
POSITIVE = Range(0, low_included=False)
PROBABILITY = Range(0, 0.5)


@dataclass(frozen=True)
class Objective:
    """One row: a loss, what it learns from, which options apply to it, and what a user should know.

    Args:
        name: what users write.
        function: from numbers per example (or per token, see `averaged`) to one loss each, without reduction.
        kind: the kind of preference it learns from.
        options: name of each keyword parameter of the function to the values it may have.
        convention: what it sums or averages and what its options mean, printed at the start of a run.
        when: when to use it, one sentence.
        learning_rate: typical learning rates, for LoRA and for full fine-tuning.
        averaged: what the losses belong to: `examples` (averaged over the examples of a step), `tokens` (averaged over
            the tokens of a step), or `micro_batch` (one per example, but each depends on the other rows of its
            micro-batch, so that the split of a step changes the numbers).
        f_divergence: an f-divergence other than the reverse KL has a meaning for it.
        inputs: names of the function's positional parameters; read from it. By them a row is known to need a reference
            (`logratios`, `reference_…`) or none (`logps`), and to use means over tokens (`mean_…`) or sums.
        defaults: its options' defaults; read from it.
    """

    name: str
    function: Callable[..., Tensor]
    kind: Kind
    options: Mapping[str, Range]
    convention: str
    when: str
    learning_rate: tuple[str, str]
    averaged: Averaged = "examples"
    f_divergence: bool = False
    inputs: tuple[str, ...] = field(init=False)
    defaults: Mapping[str, float] = field(init=False)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.function).parameters.values()
        taken = [parameter for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
        defaults = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
        if defaults.keys() != self.options.keys() or any(
            default is inspect.Parameter.empty for default in defaults.values()
        ):
            raise TypeError(f"{self.name}: options {sorted(self.options)} for keyword parameters {sorted(defaults)}")
        object.__setattr__(self, "inputs", tuple(parameter.name for parameter in taken))
        object.__setattr__(self, "defaults", defaults)

    @property
    def needs_reference(self) -> bool:
        """Whether any number it takes compares with a reference: log-ratios do, log-probs do not."""
        return any("logratios" in name or "reference" in name for name in self.inputs)

    @property
    def level(self) -> Level:
        """Whether completions enter by the sum of their tokens' log-probs or by the mean."""
        return "mean" if any("mean_" in name for name in self.inputs) else "sum"

    @property
    def requires_margins(self) -> bool:
        """Whether it has no meaning without the column `margin`; others that take margins go without."""
        return inspect.signature(self.function).parameters.get("margins", _OPTIONAL).default is inspect.Parameter.empty
