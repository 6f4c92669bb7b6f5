"""Win rate of one model over another by a judge, with ties, with an interval, and as if both wrote at equal length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from tether.errors import ConfigError
from tether.evaluate.accuracy import plain
from tether.evaluate.answers.sampling import Generation, answer
from tether.evaluate.intervals import Interval, bootstrap_mean
from tether.evaluate.named_models import Loaded
from tether.rewards import FunctionJudge, PairJudge, Verdict

_RESAMPLES = 500
_STEPS = 50
# Of the squared coefficients; keeps them finite where one model wins every time.
_PENALTY = 0.01


@dataclass(frozen=True)
class WinRate:
    """How often the first model's answer is better.

    Args:
        first: name of the model.
        second: name of the other.
        judge: name of what compared them.
        prompts: that were answered; `judged` of them have a verdict.
        wins: verdicts for the first.
        ties: neither is better, or the order in which a judge saw them decided.
        losses: verdicts for the second.
        turned: of the ties, those that the order decided.
        rate: share of verdicts for the first, a tie counted as half; bootstrap over prompts.
        controlled: the same at equal length, by a logistic regression on the difference of lengths.
        characters: mean length of the answers of the first and of the second.
        how: how answers were drawn.
    """

    first: str
    second: str
    judge: str
    prompts: int
    judged: int
    wins: int
    ties: int
    losses: int
    turned: int
    rate: Interval
    controlled: Interval
    characters: tuple[float, float]
    how: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return plain(asdict(self))


class RewardJudge:
    """Prefers the completion of the larger reward; equal rewards are a tie.

    Args:
        reward: from `prompts` and `completions` to a number each, as `tether.rewards` has them.
        name: what it is called.
    """

    def __init__(self, reward: Callable[..., Sequence[float | None]], name: str) -> None:
        self._reward, self.name = reward, name

    def compare(self, prompts: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any]) -> list[Verdict]:
        """A verdict for each prompt; no order is seen, so both are one."""
        rewards = [self._reward(prompts=list(prompts), completions=list(side)) for side in (firsts, seconds)]
        said = [_larger(first, second) for first, second in zip(*rewards, strict=True)]
        return [Verdict(value, value) for value in said]


def _larger(first: float | None, second: float | None) -> float | None:
    if first is None or second is None or math.isnan(first) or math.isnan(second):
        return None
    return 0.5 if first == second else float(first > second)


def compare_models(
    first: Loaded,
    second: Loaded,
    prompts: Dataset,
    judge: PairJudge,
    generation: Generation,
) -> WinRate:
    """Have two models answer prompts, and a judge compare the answers in both orders.

    Args:
        first: the model of interest.
        second: what it is compared with.
        prompts: see `tether.evaluate.answers.sampling.prompt_rows`.
        judge: what compares.
        generation: how answers are drawn.

    Raises:
        ConfigError: no verdict was understood.
        RewardError: the judge failed.
    """
    texts = [answer(one, prompts, generation) for one in (first, second)]
    asked = list(prompts["prompt"])
    chat = bool(asked) and not isinstance(asked[0], str)
    sides = [[[{"role": "assistant", "content": text}] if chat else text for text in side] for side in texts]
    verdicts = in_both_orders(judge, asked, *sides)
    names = (first.named.name, second.named.name, judge.name)
    return summary(verdicts, texts[0], texts[1], names, generation.words())


def in_both_orders(
    judge: PairJudge, prompts: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any]
) -> list[Verdict]:
    """Verdicts of which no order decides; equal answers tie without being asked for.

    A served judge asks in both orders itself; a function is called twice here.
    """
    places = [i for i in range(len(prompts)) if firsts[i] != seconds[i]]
    given = [[side[i] for i in places] for side in (prompts, firsts, seconds)]
    found = judge.compare(*given) if places else []
    if isinstance(judge, FunctionJudge):
        other = judge.compare(given[0], given[2], given[1]) if places else []
        found = [
            Verdict(one.forward, None if two.forward is None else 1 - two.forward)
            for one, two in zip(found, other, strict=True)
        ]
    said = dict(zip(places, found, strict=True))
    return [said.get(i, Verdict(0.5, 0.5)) for i in range(len(prompts))]


def summary(
    verdicts: Sequence[Verdict], firsts: Sequence[str], seconds: Sequence[str], names: tuple[str, str, str], how: str
) -> WinRate:
    """The win rate of verdicts.

    Args:
        verdicts: one a prompt.
        firsts: answers of the first model.
        seconds: answers of the second.
        names: of both models and of the judge.
        how: answers were drawn.
    """
    known = [i for i, verdict in enumerate(verdicts) if verdict.first is not None]
    if not known:
        raise ConfigError(
            f"The judge {names[2]!r} gave no verdict that was understood on {len(verdicts)} prompts. Look at its "
            "answers, or give another judge."
        )
    scores = np.array([verdicts[i].first for i in known], dtype=np.float64)
    lengths = np.array([[len(firsts[i]), len(seconds[i])] for i in known], dtype=np.float64)
    return WinRate(
        first=names[0],
        second=names[1],
        judge=names[2],
        prompts=len(verdicts),
        judged=len(known),
        wins=int((scores > 0.5).sum()),
        ties=int((scores == 0.5).sum()),
        losses=int((scores < 0.5).sum()),
        turned=sum(verdicts[i].turned for i in known),
        rate=bootstrap_mean(scores),
        controlled=length_controlled(scores, lengths[:, 0] - lengths[:, 1]),
        characters=(float(lengths[:, 0].mean()), float(lengths[:, 1].mean())),
        how=how,
    )


def length_controlled(scores: np.ndarray, differences: np.ndarray) -> Interval:
    """Win rate at equal length: `sigmoid(a)` of the fit `sigmoid(a + b tanh(difference / spread))`, with an interval.

    Args:
        scores: float `[N]`, 1 for a win, 0.5 for a tie, 0 for a loss.
        differences: float `[N]`, length of the first answer less that of the second.

    Reference:
        Dubois et al., Length-Controlled AlpacaEval, eq. 1 without the prompts' term, arXiv:2404.04475.

    Example:
        >>> value, low, high = length_controlled(np.array([1.0, 0.0] * 20), np.zeros(40))
        >>> round(value, 3), low < 0.5 < high
        (0.5, True)
    """
    spread = differences.std()
    shaped = np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)
    value = _at_equal_length(scores, shaped)
    if len(scores) < 2:
        return value, 0.0, 1.0
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(_RESAMPLES):
        rows = generator.integers(len(scores), size=len(scores))
        drawn.append(_at_equal_length(scores[rows], shaped[rows]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return value, float(low), float(high)


def _at_equal_length(scores: np.ndarray, shaped: np.ndarray) -> float:
    """Newton's method on the penalised likelihood, which is concave."""
    design = np.stack([np.ones_like(shaped), shaped], 1)
    found = np.zeros(2)
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-design @ found))
        slope = design.T @ (scores - chance) - 2 * _PENALTY * found
        curve = (design * (chance * (1 - chance))[:, None]).T @ design + 2 * _PENALTY * np.eye(2)
        step = np.linalg.solve(curve, slope)
        found = found + step
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-found[0])))
