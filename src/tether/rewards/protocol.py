"""What a reward is: any callable, sync or async; what it is offered, and the check of its signature before a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from tether.errors import ConfigError

RewardFunction = Callable[..., Any]
# Rewards are float32.
_LARGEST = torch.finfo(torch.float32).max
# What a function may name besides columns of the rows.
OFFERED = ("prompts", "completions", "completion_ids", "finish", "trainer_state", "log_metric", "log_extra")


@dataclass(frozen=True)
class Reward:
    """A reward function of a run.

    Args:
        function: from keywords, lists with K values each, to K numbers or None.
        name: of its metrics, one of each in a run.
        weight: in the sum.
    """

    function: RewardFunction
    name: str
    weight: float = 1.0

    @property
    def is_async(self) -> bool:
        """Whether it returns something to wait for."""
        call = getattr(self.function, "__call__", None)  # noqa: B004  an object with an async call is one too
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    def takes(self, offered: Mapping[str, Any]) -> dict[str, Any]:
        """What of an offer it names; all where it takes any keyword."""
        parameters = inspect.signature(self.function).parameters.values()
        if any(one.kind is one.VAR_KEYWORD for one in parameters):
            return dict(offered)
        return {one.name: offered[one.name] for one in parameters if one.name in offered}


@dataclass(frozen=True)
class Judged:
    """Sampled completions as reward functions see them.

    Args:
        prompts: K, text or messages, a prompt once for each of its completions.
        completions: K, text or messages.
        completion_ids: K lists of token ids.
        columns: K values each, by name: the rows' columns but `prompt`, and further fields of the completions.
        source_rows: K numbers of rows, for messages.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[list[int]]
    columns: Mapping[str, Sequence[Any]]
    source_rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.completions)

    def one(self, number: int) -> Judged:
        """A single completion."""
        columns = {name: [values[number]] for name, values in self.columns.items()}
        return Judged(
            [self.prompts[number]],
            [self.completions[number]],
            [self.completion_ids[number]],
            columns,
            [self.source_rows[number]],
        )


@dataclass(frozen=True)
class RewardTable:
    """What the functions gave.

    Args:
        values: float32 `[K, R]`, NaN for not applicable.
        seconds: R, how long each took.
        failed: R, completions that a function failed on and that were counted as not applicable.
        metrics: name to numbers that functions logged.
        extras: column to K values that functions logged for the table of completions.
    """

    values: Tensor
    seconds: tuple[float, ...]
    failed: tuple[int, ...]
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    extras: Mapping[str, list[Any]] = field(default_factory=dict)


def as_rewards(functions: Any, weights: Sequence[float] | None) -> tuple[Reward, ...]:
    """What a trainer was given as `reward_funcs`, with a name each.

    Args:
        functions: a callable or several.
        weights: one for each; None: 1 each.

    Raises:
        ConfigError: there is none, one is no callable, two have one name, or weights do not match.

    Example:
        >>> [reward.name for reward in as_rewards([len, max], None)]
        ['len', 'max']
    """
    given = list(functions) if isinstance(functions, (list, tuple)) else [functions]
    if not given:
        raise ConfigError("reward_funcs is empty; give a function, or a list of functions.")
    weights = [1.0] * len(given) if weights is None else list(weights)
    if len(weights) != len(given):
        raise ConfigError(
            f"has {len(weights)} numbers for {len(given)} reward functions; give one each.", "reward_weights"
        )
    for one in given:
        if not callable(one) or isinstance(one, type):
            raise ConfigError(
                f"reward_funcs holds {one!r}; it must be a function of prompts, completions and columns of the rows, "
                "the name of a ready-made one (tether.rewards.READY_MADE), or a model that classifies sequences."
            )
    numbers = [number_of(one) for one in weights]
    if not all(number is not None and math.isfinite(number) for number in numbers) or not any(numbers):
        raise ConfigError(
            f"has {weights!r}; expected finite numbers, of which one at least is not 0.", "reward_weights"
        )
    names = [_name_of(one) for one in given]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"Two reward functions are called {twice!r}, so that their metrics are one. Rename one: a function by its "
            "`__name__`, a model by its `config.name_or_path`."
        )
    return tuple(Reward(one, name, float(weight)) for one, name, weight in zip(given, names, weights, strict=True))


def _name_of(function: Any) -> str:
    inner = getattr(function, "func", function)  # of functools.partial
    name = getattr(function, "__name__", None) or getattr(inner, "__name__", None) or type(function).__name__
    return str(name)


def check_signatures(
    rewards: Sequence[Reward], columns: Collection[str], *, further: bool = False, name: str = ""
) -> None:
    """Refuse functions that name what nothing offers, before weights load.

    Args:
        rewards: of a run.
        columns: of its rows.
        further: a `rollout_func` may bring fields that no one knows yet.
        name: of the rows, for messages.

    Raises:
        ConfigError: a function with a column that the rows lack, or with arguments that are not named.
    """
    known = {*OFFERED, *columns} - {"prompt"}  # it is offered as `prompts`
    for reward in rewards:
        lacking: set[str] = set(getattr(reward.function, "columns", ()))
        for one in inspect.signature(reward.function).parameters.values():
            if one.kind is one.POSITIONAL_ONLY:
                raise ConfigError(
                    f"The reward function {reward.name!r} takes {one.name!r} by position alone; arguments are given by "
                    "name. Remove the slash from its signature."
                )
            if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
                lacking.add(one.name)
        lacking -= known
        if lacking and not further:
            missing = ", ".join(map(repr, sorted(lacking)))
            raise ConfigError(
                f"{name}{': ' if name else ''}The reward function {reward.name!r} needs {missing}, and the rows have "
                f"the columns {', '.join(sorted(columns)) or 'none'}; besides these, {', '.join(OFFERED)} are offered. "
                "Rename its argument, or add the column."
            )


def number_of(value: Any) -> float | None:
    """A reward as a number; NaN for None.

    >>> number_of(True), number_of("good"), number_of(torch.ones(2)), number_of(10**400)
    (1.0, None, None, None)
    """
    if value is None:
        return float("nan")
    try:
        if isinstance(value, (Decimal, Fraction)):
            value = float(value)
        if hasattr(value, "item") and not isinstance(value, (int, float)):  # of torch or numpy
            value = value.item()
    except (OverflowError, RuntimeError, TypeError, ValueError):  # too large, or several numbers
        return None
    if not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        return None
    return float(value)
