"""When a run needs attention, by what it logs: one rule a kind of trouble, each with a paragraph in `docs/health.md`.

A line is for a state that lasts; a healthy run has none (a test replays one). The figures lie beyond what the demo
logs, which learns and keeps its text (135M parameters, 35 steps): the comments say by how much, and
`test_the_limits_lie_beyond_what_the_demo_logs` measures it. Those without a comment on the demo are of sampled text, or
divide what cannot go on from what can (all rewards equal, every completion cut).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Logs = dict[str, float]

# Steps that a state must last, by how noisy its figures are.
_SOON, _LATER = 10, 30
# Nats of the log-ratio of a pair under which nothing was learnt (the demo: 0.04 after 4 steps, in the middle of its
# warm-up); nats that a completion may lose, whatever its length (the demo: 6.7 of 52 at most; a run that a learning
# rate of 5 wrecked: 80).
_NO_MARGIN = 0.02
_LOST = 20.0
# The demo: 0.94 at most.
_SATURATED = 0.999
# A gradient that is so many times the limit is not trimmed: the limit then decides the size of every step. The demo:
# 1.2 times.
_CLIPPED = 10.0
_EQUAL_SHARE = 0.9
_ENTROPY_SHARE = 0.1
# Nats a token. The demo: 0.66 in one log, 0.38 in the next, where the limit asks for 10 steps in a row.
_FAR = 1.0
_LONGER, _LONG = 3.0, 32.0
_NO_LOSS = 1e-6
# Learning rates of Adam between which preference training is known to work; small models take larger ones.
_RATES = {"LoRA": (1e-6, 2e-3), "full": (1e-8, 1e-4)}
_SMALL = 20_000_000


@dataclass(frozen=True)
class Facts:
    """What a run is, as far as the rules ask.

    Args:
        adapter: an adapter trains, and not the model itself.
        parameters: of the model.
        learning_rate: the highest of the schedule.
        adam: the optimizer is one of Adam's family, whose learning rates can be compared.
        max_grad_norm: 0 for no limit.
        beta: of the objective; None where it has none, and rewards are log-probabilities.
    """

    adapter: bool = True
    parameters: int = 0
    learning_rate: float = 0.0
    adam: bool = False
    max_grad_norm: float = 0.0
    beta: float | None = None


@dataclass(frozen=True)
class Finding:
    """Something that needs attention.

    Args:
        name: of its paragraph in `docs/health.md`.
        line: what was seen, and what to do.
    """

    name: str
    line: str


class Health:
    """Follows a run log by log; each thing is said once, until it has passed.

    Args:
        facts: what the run is.
        step: where it begins.

    Example:
        >>> health = Health(Facts())
        >>> [found.name for found in health.look({"loss": 0.1, "completions/clipped_ratio": 1.0}, 1)]
        ['completions-cut']
        >>> health.look({"loss": 0.1, "completions/clipped_ratio": 1.0}, 2)
        []
    """

    def __init__(self, facts: Facts, step: int = 0) -> None:
        self._facts, self._step = facts, step
        self._since: dict[str, int] = {}
        self._said: set[str] = set()
        self._warm = False
        self._first: Logs = {}
        self._constant: dict[str, float | None] = {}

    def look(self, logs: Logs, step: int) -> list[Finding]:
        """What there is to say of a training log.

        Args:
            logs: means of the steps since the last one.
            step: the last of them.
        """
        for name, value in logs.items():
            if isinstance(value, float | int):
                self._first.setdefault(name, value)
        found = [self._rate(step), *(rule(self, logs, step) for rule in _RULES), *self._constant_rewards(logs, step)]
        self._step = step
        return [one for one in found if one is not None]

    def lasting(self, name: str, holds: bool, steps: int, step: int, line: str, key: str = "") -> Finding | None:
        """A finding where something has held for so many steps and was not said yet."""
        key = key or name
        if not holds:
            self._since.pop(key, None)
            self._said.discard(key)
            return None
        begun = self._since.setdefault(key, self._step)
        if key in self._said or step - begun < steps:
            return None
        self._said.add(key)
        return Finding(name, line)

    def _rate(self, step: int) -> Finding | None:
        facts, kind = self._facts, "LoRA" if self._facts.adapter else "full"
        (low, high), rate = _RATES[kind], facts.learning_rate
        holds = facts.adam and facts.parameters >= _SMALL and not low <= rate <= high
        trained = "an adapter" if facts.adapter else "all weights"
        line = (
            f"a learning rate of {rate:.3g} is unusually {'low' if rate < low else 'high'} for training {trained} with "
            f"Adam (usual: {low:.0e} to {high:.0e}). Check it, or watch loss and margin closely."
        )
        return self.lasting("learning-rate", holds, 0, step, line)

    def _margin(self, logs: Logs, step: int) -> Finding | None:
        beta, margin = self._facts.beta, logs.get("rewards/margins", math.inf)
        # In a warm-up nothing may have been learnt yet; after it, the schedule may take the rate down again.
        self._warm = self._warm or logs.get("learning_rate", 0.0) >= 0.5 * self._facts.learning_rate
        still = beta is not None and abs(margin) < _NO_MARGIN * beta
        line = (
            f"the reward margin has stayed at zero for {_LATER} steps since the warm-up ({margin:.2g} now): "
            "nothing is learnt. Raise the learning rate, and look whether chosen and rejected really differ."
        )
        return self.lasting("margin-zero", still and self._warm, _LATER, step, line)

    def _accuracy(self, logs: Logs, step: int) -> Finding | None:
        line = (
            f"every training pair has been in the right order for {_LATER} steps: what is left to learn is only "
            "certainty. Train for fewer epochs, or look whether one thing such as length gives the answers away."
        )
        saturated = logs.get("rewards/accuracies", 0.0) >= _SATURATED
        return self.lasting("accuracy-saturated", saturated, _LATER, step, line)

    def _chosen(self, logs: Logs, step: int) -> Finding | None:
        start, now = self._first.get("logps/chosen", math.nan), logs.get("logps/chosen", math.nan)
        line = (
            f"chosen completions have become {start - now:.0f} nats less likely than at the start ({start:.0f} to "
            f"{now:.0f}). Lower the learning rate, raise beta, or add a term on chosen (rpo_alpha, or the loss sft)."
        )
        return self.lasting("chosen-collapsing", start - now > max(_LOST, abs(start) / 2), _SOON, step, line)

    def _gradient(self, logs: Logs, step: int) -> Finding | None:
        limit, norm = self._facts.max_grad_norm, logs.get("grad_norm", 0.0)
        clipped = limit > 0 and norm > _CLIPPED * limit
        line = (
            f"the gradient norm has been more than {_CLIPPED:.0f} times max_grad_norm ({limit:g}) for {_LATER} steps "
            f"({norm:.3g} now), so that clipping sets the size of every step. Raise max_grad_norm, or lower the "
            "learning rate."
        )
        return self.lasting("gradient-clipped", clipped, _LATER, step, line)

    def _vanished(self, logs: Logs, step: int) -> Finding | None:
        line = (
            f"the gradient has been exactly 0 for {_SOON} steps: nothing is learnt any more. A run that has diverged "
            "ends so. Go back to an earlier checkpoint with a lower learning rate, or set max_grad_norm."
        )
        return self.lasting("gradient-zero", logs.get("grad_norm") == 0.0, _SOON, step, line)

    def _cut(self, logs: Logs, step: int) -> Finding | None:
        line = "every completion was cut off at max_completion_length, so that the policy ended none. Raise it."
        return self.lasting("completions-cut", logs.get("completions/clipped_ratio", 0.0) >= 1.0, 0, step, line)

    def _unjudged(self, logs: Logs, step: int) -> Finding | None:
        shares = [value for name, value in logs.items() if name.endswith("/not_applicable")]
        line = (
            "no reward applied to any completion: every function returned None, so that nothing is learnt. Call them."
        )
        return self.lasting("nothing-judged", bool(shares) and min(shares) >= 1.0, 0, step, line)

    def _lengths(self, logs: Logs, step: int) -> Finding | None:
        name = "completions/mean_length"
        first, now = self._first.get(name) or math.inf, logs.get(name, 0.0)  # 0 where others wrote all of them
        line = (
            f"sampled completions are {now / first:.1f} times as long as at the start ({first:.0f} to {now:.0f} "
            "tokens). Look at some: a reward that grows with length, or text that never ends."
        )
        return self.lasting("lengths-exploding", now > max(_LONG, _LONGER * first), _SOON, step, line)

    def _equal(self, logs: Logs, step: int) -> Finding | None:
        line = (
            f"in more than {_EQUAL_SHARE:.0%} of the groups all rewards have been equal for {_SOON} steps, and such "
            "groups teach nothing. Take prompts of another difficulty, or a reward with more than two values."
        )
        equal = logs.get("frac_reward_zero_std", 0.0) > _EQUAL_SHARE
        return self.lasting("rewards-equal", equal, _SOON, step, line)

    def _far(self, logs: Logs, step: int) -> Finding | None:
        # Of what the policy sampled, or of the data's completions, whose estimate is rougher.
        sampled = "kl" in logs
        divergence = logs.get("kl", logs.get("kl/k3", 0.0))
        line = (
            f"the KL divergence from the reference is {divergence:.3g} nats a token. Lower the learning rate, or raise "
            "beta."
        )
        return self.lasting("reference-far", divergence > _FAR, 0 if sampled else _SOON, step, line)

    def _entropy(self, logs: Logs, step: int) -> Finding | None:
        first, now = self._first.get("entropy", 0.0), logs.get("entropy", math.inf)
        line = (
            f"the entropy has fallen from {first:.3g} to {now:.3g} nats a token, so that completions of a prompt are "
            "nearly the same. Lower the learning rate, raise epsilon_high or the temperature."
        )
        sampled = "frac_reward_zero_std" in self._first
        return self.lasting("entropy", sampled and now < _ENTROPY_SHARE * first, 0, step, line)

    def _no_loss(self, logs: Logs, step: int) -> Finding | None:
        nothing = abs(logs.get("loss", 1.0)) < _NO_LOSS and "frac_reward_zero_std" in logs
        # Once is enough: it is normal, and startles.
        if not nothing or logs["frac_reward_zero_std"] >= 1.0 or "no-loss" in self._said:
            return None
        usual = "a loss of 0 is normal in the first update of a rollout: advantages have mean 0 and ratios are 1."
        return self.lasting("no-loss", True, 0, step, usual)

    def _constant_rewards(self, logs: Logs, step: int) -> list[Finding | None]:
        """Reward functions that have given one number ever since the start."""
        found = []
        for key in [key for key in logs if key.startswith("rewards/") and key.endswith("/std")]:
            name = key.removeprefix("rewards/").removesuffix("/std")
            mean = logs.get(f"rewards/{name}/mean")
            held = self._constant.setdefault(name, mean)
            same = held is not None and logs[key] == 0.0 and mean == held
            if not same:
                self._constant[name] = None
            line = f"the reward {name} has been {mean} for every completion from the start. Look at the function."
            found.append(self.lasting("rewards-constant", same, _SOON, step, line, key=f"constant {name}"))
        return found


_RULES: tuple[Callable[[Health, Logs, int], Finding | None], ...] = (
    Health._margin,
    Health._accuracy,
    Health._chosen,
    Health._gradient,
    Health._vanished,
    Health._cut,
    Health._unjudged,
    Health._lengths,
    Health._equal,
    Health._far,
    Health._entropy,
    Health._no_loss,
)
