"""Judges: which of two completions is better, or how good one is; a served model, a Python function, a reward.

A served model is asked in both orders, as models prefer a place; verdicts that the order turns round count as a tie.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tether.errors import ConfigError, RewardError
from tether.reference.methods.transport import Transport
from tether.reference.spec import RemoteOptions
from tether.rewards.builtin import text_of
from tether.rewards.protocol import RewardFunction, number_of

COMPARE = """\
Two assistants answered the same prompt. Say which answer is better: more correct, more helpful, and better written. \
Length and the order in which they stand do not count.

<prompt>
{prompt}
</prompt>

<answer_a>
{first}
</answer_a>

<answer_b>
{second}
</answer_b>

End with one line that is nothing but A, B or TIE."""
RATE = """\
Rate how well the answer responds to the prompt, from 1 (useless) to 10 (could not be better).

<prompt>
{prompt}
</prompt>

<answer>
{first}
</answer>

End with one line that is nothing but the number."""
_VERDICTS = {"A": 1.0, "B": 0.0, "TIE": 0.5}
_RATING = re.compile(r"^\W*(10|[1-9](?:\.\d+)?)(?:\s*/\s*10)?\W*$")


@dataclass(frozen=True)
class Verdict:
    """What a judge said of two completions, in the order in which they were given and in the other one.

    Args:
        forward: 1 where the first is better, 0 where the second is, 0.5 for a tie; None: it was not understood.
        backward: the same of the other order, said of the same first; None too where it was not asked.

    Example:
        >>> Verdict(1.0, 1.0).first, Verdict(1.0, 0.0).first, Verdict(1.0, 0.0).turned
        (1.0, 0.5, True)
    """

    forward: float | None
    backward: float | None

    @property
    def first(self) -> float | None:
        """1 where the first is better, 0 where the second is, 0.5 for a tie; None where an order was not understood."""
        if self.forward is None or self.backward is None:
            return None
        return 0.5 if self.turned else (self.forward + self.backward) / 2

    @property
    def turned(self) -> bool:
        """The order decided."""
        return self.forward is not None and self.backward is not None and abs(self.forward - self.backward) == 1


class PairJudge(Protocol):
    """What compares completions of one prompt."""

    name: str

    def compare(self, prompts: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any]) -> list[Verdict]:
        """A verdict for each prompt (text or messages) and its two completions."""
        ...


class EndpointJudge:
    """A model behind an OpenAI-compatible `/v1/chat/completions`.

    Args:
        options: address, name of the model, key, limits.
        instructions: what it is asked, with `{prompt}`, `{first}` and, to compare, `{second}`; None: `COMPARE` and
            `RATE`.
        max_tokens: of its answer.

    Raises:
        ConfigError: instructions without a place that they need.
        RewardError: the server cannot be reached, or serves other models.
    """

    def __init__(self, options: RemoteOptions, instructions: str | None = None, max_tokens: int = 512) -> None:
        places = ("{prompt}", "{first}")
        lacking = [place for place in places if instructions is not None and place not in instructions]
        if lacking:
            raise ConfigError(f"The judge's instructions have no {lacking[0]}; expected {', '.join(places)}. Add it.")
        self._instructions, self._most = instructions, max_tokens
        self._options = options
        self._transport: Transport | None = None
        self.name = f"judge_{options.model}" if options.model else "judge"

    def compare(self, prompts: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any]) -> list[Verdict]:
        """See `PairJudge`; each pair is asked in both orders."""
        if self._instructions is not None and "{second}" not in self._instructions:
            raise ConfigError("The judge's instructions have no {second}, and it compares two answers. Add it.")
        given = list(zip(prompts, firsts, seconds, strict=True))
        asked = [self._filled(COMPARE, *one) for one in given]
        asked += [self._filled(COMPARE, prompt, second, first) for prompt, first, second in given]
        said = [verdict_of(answer) for answer in self._answers(asked)]
        forward, backward = said[: len(given)], said[len(given) :]
        turned = [None if one is None else 1 - one for one in backward]
        return [Verdict(one, other) for one, other in zip(forward, turned, strict=True)]

    def rate(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
        """A number from 1 to 10 for each completion; None where the answer was not understood."""
        pairs = zip(prompts, completions, strict=True)
        return [rating_of(answer) for answer in self._answers([self._filled(RATE, *pair, "") for pair in pairs])]

    def _filled(self, usual: str, prompt: Any, first: Any, second: Any) -> str:
        text = self._instructions or usual
        values = {"{prompt}": prompt_text(prompt), "{first}": text_of(first), "{second}": text_of(second)}
        # At once, so that a completion that holds `{second}` stays what it is.
        return re.sub(r"\{(?:prompt|first|second)\}", lambda found: values[found.group()], text)

    def _answers(self, asked: list[str]) -> list[str]:
        if self._transport is None:  # not before it is needed: a run file is checked without the server
            hint = "Check that it runs, and what it serves."
            self._transport = Transport(self._options, "judge", RewardError, hint)
            self._model = self._options.model or self._transport.find_model()["id"]
        distinct = list(dict.fromkeys(asked))
        found = dict(zip(distinct, self._transport.many(self._answer, distinct), strict=True))
        return [found[one] for one in asked]

    def _answer(self, asked: str) -> str:
        assert self._transport is not None
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": asked}],
            "temperature": 0.0,
            "max_tokens": self._most,
        }
        answer = self._transport.ask("/chat/completions", body)
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise RewardError(
                f"The judge at {self._transport.url} answered in another form than a chat completion: "
                f"{self._transport.masked(answer)[:200]}"
            ) from error


class FunctionJudge:
    """A function `f(prompt, first, second)` that returns 1 where the first is better, 0 where the second is, 0.5 for a
    tie.

    Args:
        function: asked once a pair, as it sees no order but the one that it is given.

    Raises:
        ConfigError: it takes other arguments.
    """

    def __init__(self, function: Callable[[Any, Any, Any], Any]) -> None:
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        try:
            inspect.signature(function).bind("prompt", "first", "second")
        except TypeError as error:
            raise ConfigError(
                f"The judge {self.name!r} must take three arguments, a prompt and two completions: {error}."
            ) from error

    def compare(self, prompts: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any]) -> list[Verdict]:
        """See `PairJudge`.

        Raises:
            RewardError: it returned something else.
        """
        found = []
        for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
            said = self._function(prompt, first, second)
            value = number_of(said)
            if value is None or not 0 <= value <= 1:
                raise RewardError(f"The judge {self.name!r} returned {said!r}; expected a number from 0 to 1.")
            found.append(Verdict(value, value))
        return found


def judge_reward(judge: EndpointJudge) -> RewardFunction:
    """A judge's rating of each completion as a reward, from 0 to 1; None where its answer was not understood."""

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | None]:
        return [None if one is None else (one - 1) / 9 for one in judge.rate(prompts, completions)]

    return _named(reward, judge.name)


def win_rate(judge: PairJudge) -> RewardFunction:
    """How often a completion beats the others of its prompt, from 0 to 1, as a reward; None where it has no rival.

    The others are those of the same call: with several processes, those of this process. Equal completions tie and are
    not asked for.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | None]:
        said = [(prompt_text(prompt), text_of(one)) for prompt, one in zip(prompts, completions, strict=True)]
        pairs = [
            (i, j)
            for i in range(len(said))
            for j in range(i + 1, len(said))
            if said[i][0] == said[j][0] and said[i][1] != said[j][1]
        ]
        first, second = [i for i, _ in pairs], [j for _, j in pairs]
        verdicts = judge.compare(
            [prompts[i] for i in first], [completions[i] for i in first], [completions[j] for j in second]
        )
        known: dict[int, list[float]] = {}
        for (i, j), verdict in zip(pairs, verdicts, strict=True):
            if verdict.first is not None:
                known.setdefault(i, []).append(verdict.first)
                known.setdefault(j, []).append(1 - verdict.first)
        for i, one in enumerate(said):  # equal completions
            known.setdefault(i, []).extend([0.5] * (said.count(one) - 1))
        return [sum(known[i]) / len(known[i]) if known[i] else None for i in range(len(said))]

    return _named(reward, judge.name)


def verdict_of(answer: str) -> float | None:
    """1 for A, 0 for B, 0.5 for a tie, by an answer's last line that says one; None where none does.

    >>> verdict_of("Both are fine.\\n**B**"), verdict_of("TIE."), verdict_of("A or B?")
    (0.0, 0.5, None)
    """
    for line in reversed(answer.strip().splitlines()):
        said = re.sub(r"[^A-Za-z ]", "", line).strip().upper().removeprefix("ANSWER").strip()
        if said in _VERDICTS:
            return _VERDICTS[said]
    return None


def rating_of(answer: str) -> float | None:
    """The number from 1 to 10 of an answer's last line that is one; None where none is.

    >>> rating_of("Good.\\n**8**"), rating_of("7/10"), rating_of("11"), rating_of("10 apples")
    (8.0, 7.0, None, None)
    """
    for line in reversed(answer.strip().splitlines()):
        if found := _RATING.match(line):
            return float(found[1])
    return None


def prompt_text(prompt: Any) -> str:
    """A prompt that is text or messages, the latter with their roles.

    >>> prompt_text([{"role": "user", "content": "Hi"}])
    'user: Hi'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{one.get('role', '')}: {one.get('content') or ''}" for one in prompt)


def _named(reward: Any, name: str) -> RewardFunction:
    reward.__name__ = name
    return reward
