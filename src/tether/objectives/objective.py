"""What a row of the registry of objectives is: a loss, what it takes, its options, and what a user should know.

Nothing hangs on how a function spells its parameters: a row says what goes to each of them, in their order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Literal

from torch import Tensor

from tether.types import Kind

Algorithm = Literal["dpo", "kto", "orpo", "cpo", "sft", "reward", "grpo", "rloo"]
Averaged = Literal["examples", "tokens", "micro_batch", "completions", "completion_sums", "longest"]
Level = Literal["token", "sequence", "sum"]
Quantity = Literal[
    "logratios",
    "logps",
    "token_logps",
    "reference_logps",
    "reference_kl",
    "rewards",
    "margins",
    "desirable",
    "mismatched_mean",
    "running_mean",
    "log_ratios",
    "log_weights",
    "advantages",
]
# What only a reference can give; a row that takes one of these has a reference loaded or run.
_OF_A_REFERENCE: tuple[Quantity, ...] = ("logratios", "reference_logps", "reference_kl")


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
        return low + high if isfinite(self.low) else "a number" + high


@dataclass(frozen=True)
class Option:
    """A number that a loss is called with; its name and default are TRL's where TRL has it.

    Args:
        name: of the function's keyword parameter, of the configuration's field and of the run file's key.
        default: None leaves it unset.
        allowed: bounds; None is allowed too where it is the default.
        text: one line for the configuration's docstring, the JSON schema and the command line.
    """

    name: str
    default: float | None
    allowed: Range
    text: str


@dataclass(frozen=True)
class Input:
    """A number of each example that a loss takes.

    Args:
        quantity: what it is: `logratios` (policy minus reference, through the f-divergence's derivative), `logps` (the
            policy's), `token_logps` (of every token), `reference_logps`, `reference_kl` (of whole distributions, summed
            over tokens), `rewards` (of a reward model), `margins` (the column `margin`), `desirable` (the column
            `label`), `mismatched_mean` and `running_mean` (one number for all: the mean log-ratio of other rows'
            completions under each prompt, and of all rows in earlier steps). Of sampled completions, at each token:
            `log_ratios` (policy minus the policy that began the updates), `log_weights` (policy minus what sampled,
            summed over a completion) and `advantages`.
        of: which completion of a pair; `each`: of a list, all of them; of one completion, that one.
        per_token: divided by the completion's tokens.
        optional: None where the rows have no such column.
    """

    quantity: Quantity
    of: Literal["chosen", "rejected", "each"] = "each"
    per_token: bool = False
    optional: bool = False

    @property
    def name(self) -> str:
        """What it is called in messages, such as `chosen_mean_logps`."""
        return f"{'' if self.of == 'each' else f'{self.of}_'}{'mean_' * self.per_token}{self.quantity}"


def of_pair(quantity: Quantity, *, per_token: bool = False) -> tuple[Input, Input]:
    """A number of the chosen and of the rejected completion."""
    return Input(quantity, "chosen", per_token), Input(quantity, "rejected", per_token)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One row: a loss, what it learns from, which options apply to it, and what a user should know.

    Args:
        name: what users write as `loss_type`.
        algorithm: what runs it.
        function: from numbers per example (or per token, see `averaged`) to one loss each, without reduction.
        kind: the kind of preference it learns from.
        inputs: what its positional parameters get, in their order. A reference is needed where one of these compares
            with it.
        options: its keyword parameters.
        convention: what it sums or averages and what its options mean, printed at the start of a run.
        when: when to use it, one sentence.
        learning_rate: typical learning rates, for LoRA and for full fine-tuning.
        averaged: what the losses belong to: `examples` (averaged over the examples of a step), `tokens` (averaged over
            the tokens of a step), or `micro_batch` (one per example, but each depends on the other rows of its
            micro-batch, so that the split of a step changes the numbers). Of sampled completions, whose losses are per
            token, also `completions` (the mean over its tokens, averaged over the completions of a step),
            `completion_sums` (the sum over its tokens) and `longest` (that sum over the most tokens there may be).
        f_divergence: an f-divergence other than the reverse KL has a meaning for it.
        around: options that the algorithm applies before or beside the function.
        key: what a run file calls it when it stands alone; empty: its name; None: only Python has it.
        preset: options that the run file's name stands for besides the loss.
        level: what a log-ratio of sampled completions is: of each `token`; their mean over the completion
            (`sequence`); or their `sum`.
    """

    name: str
    algorithm: Algorithm
    function: Callable[..., Tensor]
    kind: Kind
    inputs: tuple[Input, ...]
    options: tuple[Option, ...] = ()
    convention: str
    when: str
    learning_rate: tuple[str, str]
    averaged: Averaged = "examples"
    f_divergence: bool = False
    around: tuple[Option, ...] = ()
    key: str | None = ""
    preset: Mapping[str, float | str] = field(default_factory=dict)
    level: Level = "token"

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.function).parameters.values()
        places = [one for one in parameters if one.kind is not one.KEYWORD_ONLY]
        required = [one for one in places if one.default is one.empty]
        keywords = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
        if not len(required) <= len(self.inputs) <= len(places):
            raise TypeError(f"{self.name}: {len(self.inputs)} inputs for {len(places)} positional parameters")
        if sorted(keywords) != sorted(option.name for option in self.options):
            raise TypeError(f"{self.name}: options {[*self.defaults]} for keyword parameters {keywords}")

    def __call__(self, *inputs: Tensor | float | None, **options: float | None) -> Tensor:
        """The losses; an option that is left out has its default."""
        return self.function(*inputs, **{**self.defaults, **options})

    @property
    def defaults(self) -> dict[str, float | None]:
        """Its options' defaults."""
        return {option.name: option.default for option in self.options}

    @property
    def run_file_key(self) -> str | None:
        """What a run file calls it when it stands alone; None: nothing."""
        return self.key if self.key is None else self.key or self.name

    @property
    def needs_reference(self) -> bool:
        """Whether any number it takes compares with a reference."""
        return any(one.quantity in _OF_A_REFERENCE for one in self.inputs)

    @property
    def per_token(self) -> bool:
        """Whether completions enter by the mean of their tokens' log-probs alone."""
        return all(one.per_token for one in self.inputs)

    def takes(self, quantity: Quantity) -> bool:
        """Whether it takes these numbers."""
        return any(one.quantity == quantity for one in self.inputs)

    @property
    def requires_margins(self) -> bool:
        """Whether it has no meaning without the column `margin`; others that take margins go without."""
        return any(one.quantity == "margins" and not one.optional for one in self.inputs)


@dataclass(frozen=True)
class Problem:
    """What is wrong with an option: its name, and words that follow it."""

    field: str
    words: str

    def __str__(self) -> str:
        return f"{self.field} {self.words}"
