"""Calling reward functions: sync ones one after the other, async ones together, with time-outs and named failures."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from tether.errors import RewardError, line_in
from tether.rewards.protocol import Judged, Reward, RewardTable, number_of

# The largest share of a batch on which a function may fail where failures are counted instead of raised.
_TOLERATED = 0.1
_SHOWN = 160
# Seconds that async functions have to end when they are cancelled.
_CANCELLING = 2.0
# What a function may fail with; an interrupt is the user's.
_FAILURES = (Exception, SystemExit, asyncio.CancelledError)
# Sums of rewards have squares that float32 holds, as deviations are made of these.
_LARGEST_SUM = 1e18


@dataclass(frozen=True)
class Calling:
    """How reward functions are called.

    Args:
        timeout: seconds that a call may take; None: any.
        on_error: `raise`, or `none`: a completion that a function fails on has no reward of it.
    """

    timeout: float | None = None
    on_error: Literal["raise", "none"] = "raise"


@dataclass
class _Log:
    """What functions log."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)

    def metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def extra(self, column: str, values: Sequence[Any]) -> None:
        self.extras.setdefault(column, []).extend(values)


@dataclass(frozen=True)
class _Answer:
    """What a call came to."""

    values: Any = None
    seconds: float = 0.0
    error: BaseException | None = None


def call_rewards(rewards: Sequence[Reward], judged: Judged, *, state: Any = None, calling: Calling) -> RewardTable:
    """The rewards of K completions by R functions.

    Args:
        rewards: the functions.
        judged: the completions.
        state: transformers' state of the trainer, for functions that name `trainer_state`.
        calling: time-outs, and what happens on a failure.

    Raises:
        RewardError: with the function, and the row where it is known.
    """
    log = _Log()
    answers = {reward.name: _timed(reward, judged, state, log, calling) for reward in rewards if not reward.is_async}
    waiting = [reward for reward in rewards if reward.is_async]
    answers.update(_together(waiting, judged, state, log, calling))
    columns, failed = [], []
    for reward in rewards:
        values, lost = _checked(reward, answers[reward.name], judged, state, calling)
        columns.append(torch.tensor(values, dtype=torch.float32))
        failed.append(lost)
    seconds = tuple(answers[reward.name].seconds for reward in rewards)
    values = torch.stack(columns, 1)
    sums = (values * torch.tensor([reward.weight for reward in rewards])).nansum(1).abs()
    if sums.numel() and not sums.max() <= _LARGEST_SUM:
        place = int(sums.argmax())
        raise RewardError(
            f"The weighted sum of rewards is {sums[place].item():g} in size {_where(judged, place)}; expected at most "
            f"{_LARGEST_SUM:g}. Scale the functions."
        )
    return RewardTable(values, seconds, tuple(failed), log.metrics, log.extras)


def _offered(judged: Judged, state: Any, log: _Log) -> dict[str, Any]:
    """What a call may name; lists are its own, so that what it does to them reaches no other function."""
    return {
        **{name: list(values) for name, values in judged.columns.items()},
        "prompts": list(judged.prompts),
        "completions": copy.deepcopy(list(judged.completions)),
        "completion_ids": [list(ids) for ids in judged.completion_ids],
        "trainer_state": state,
        "log_metric": log.metric,
        "log_extra": log.extra,
    }


def _timed(reward: Reward, judged: Judged, state: Any, log: _Log, calling: Calling) -> _Answer:
    arguments, begun = reward.takes(_offered(judged, state, log)), time.perf_counter()
    found = _within(lambda: _listed(reward.function(**arguments)), calling.timeout)
    return _Answer(found.values, time.perf_counter() - begun, found.error)


def _listed(values: Any) -> Any:
    """What a function gives one by one is asked for inside its call, as it may fail on the way."""
    return list(values) if isinstance(values, Iterator) else values


def _within(call: Callable[[], Any], timeout: float | None) -> _Answer:
    """Call something, in a thread of its own where it must end in time: one that does not is left to itself."""
    held: list[_Answer] = []

    def run() -> None:
        try:
            held.append(_Answer(call()))
        except _FAILURES as error:
            held.append(_Answer(error=error))

    if timeout is None:
        run()
        return held[0]
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    return (
        held[0] if held else _Answer(error=TimeoutError(f"it took more than {timeout:g} seconds and was left behind"))
    )


def _together(rewards: Sequence[Reward], judged: Judged, state: Any, log: _Log, calling: Calling) -> dict[str, _Answer]:
    """All async functions at once; in a thread, as the caller may have an event loop of its own.

    One that never waits keeps the others waiting and cannot be cancelled; then all that are not done are left behind.
    """
    found: dict[str, _Answer] = {}

    async def called(reward: Reward) -> _Answer:
        try:
            return _Answer(await reward.function(**reward.takes(_offered(judged, state, log))))
        except (Exception, SystemExit) as error:
            return _Answer(error=error)

    async def one(reward: Reward) -> None:
        begun = time.perf_counter()
        try:
            answer = await asyncio.wait_for(called(reward), calling.timeout)
        except TimeoutError:
            late = f"it took more than {calling.timeout:g} seconds and was cancelled"
            answer = _Answer(error=TimeoutError(late))
        except asyncio.CancelledError as error:  # by itself
            answer = _Answer(error=error)
        found[reward.name] = replace(answer, seconds=time.perf_counter() - begun)

    async def every() -> None:
        await asyncio.gather(*map(one, rewards))

    if not rewards:
        return {}
    thread = threading.Thread(target=lambda: asyncio.run(every()), daemon=True)
    thread.start()
    thread.join(None if calling.timeout is None else calling.timeout + _CANCELLING)
    done = dict(found)
    late = f"it, or another async function, blocked for more than {calling.timeout} seconds and was left behind"
    return {reward.name: done.get(reward.name, _Answer(error=TimeoutError(late))) for reward in rewards}


def _checked(reward: Reward, answer: _Answer, judged: Judged, state: Any, calling: Calling) -> tuple[list[float], int]:
    """The values of a call, NaN for not applicable, and on how many completions it failed."""
    if answer.error is not None:
        # What is late, or a server that cannot be reached, is so of each completion.
        if isinstance(answer.error, (TimeoutError, RewardError)) or len(judged) == 0:
            raise RewardError(_failure(reward, judged, None, answer.error)) from answer.error
        return _one_by_one(reward, answer.error, judged, state, calling)
    try:
        if isinstance(answer.values, (str, bytes, dict, set)):
            raise TypeError
        values = list(answer.values)
    except TypeError:
        raise RewardError(
            f"The reward function {reward.name!r} returned {answer.values!r}; expected a list of {len(judged)} numbers."
        ) from None
    if len(values) != len(judged):
        raise RewardError(
            f"The reward function {reward.name!r} returned {len(values)} rewards for {len(judged)} completions; "
            "expected one each, or None for a completion that it does not apply to."
        )
    numbers = [number_of(value) for value in values]
    for place, (number, value) in enumerate(zip(numbers, values, strict=True)):
        if number is None:
            raise RewardError(
                f"The reward function {reward.name!r} returned {value!r} {_where(judged, place)}; expected a finite "
                "number, or None where it does not apply."
            )
    return [number for number in numbers if number is not None], 0


def _one_by_one(
    reward: Reward, error: BaseException, judged: Judged, state: Any, calling: Calling
) -> tuple[list[float], int]:
    """Which completion a function fails on: each alone. What it logs then is dropped."""
    values, bad = [], []
    for place in range(len(judged)):
        alone, log = judged.one(place), _Log()
        answer = (
            _together([reward], alone, state, log, calling)[reward.name]
            if reward.is_async
            else _timed(reward, alone, state, log, calling)
        )
        if answer.error is not None:
            if calling.on_error == "raise":
                raise RewardError(_failure(reward, judged, place, answer.error)) from answer.error
            bad.append(place)
            values.append(float("nan"))
        else:
            values += _checked(reward, answer, alone, state, calling)[0]
    if calling.on_error == "raise":  # it fails on all of them together, and on none alone
        raise RewardError(_failure(reward, judged, None, error)) from error
    if len(bad) > _TOLERATED * len(judged):
        raise RewardError(
            f"{_failure(reward, judged, bad[0], error)} It failed on {len(bad)} of {len(judged)} completions, more "
            f"than the {_TOLERATED:.0%} that reward_on_error='none' allows."
        ) from error
    return values, len(bad)


def _failure(reward: Reward, judged: Judged, place: int | None, error: BaseException) -> str:
    where = f"on {len(judged)} completions" if place is None else _where(judged, place)
    said = f"The reward function {reward.name!r} failed {where}"
    if isinstance(error, (TimeoutError, RewardError)) and str(error):
        return f"{said}: {str(error).removesuffix('.')}."
    what = f"{type(error).__name__}: {error}".strip().removesuffix(":").removesuffix(".")
    return f"{said}: {what}{line_in(reward.function, error)}. Correct the function."


def _where(judged: Judged, place: int) -> str:
    prompt, completion = str(judged.prompts[place])[-_SHOWN:], str(judged.completions[place])[:_SHOWN]
    return f"on row {judged.source_rows[place]} (prompt …{prompt!r}, completion {completion!r}…)"
