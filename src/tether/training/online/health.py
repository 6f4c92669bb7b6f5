"""What is said of a run of sampled completions when it learns nothing, and how far its reward has come."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("tether")
# Steps that a state must last, share of groups, of the first entropy, and nats a token: rules of thumb.
_STEPS = 10
_EQUAL_SHARE = 0.9
_ENTROPY_SHARE = 0.1
_FAR = 1.0
_NO_LOSS = 1e-6


class Progress:
    """How far the mean reward has come since the first log, with its standard error, over groups.

    Completions of a group share their prompt, so that groups are what is independent.
    """

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None
        self._groups: list[Tensor] = []

    def add(self, rewards: Tensor, group: int) -> None:
        """Take the rewards `[K]` of a rollout, NaN where none applied."""
        means = rewards.view(-1, group).nanmean(1)
        self._groups.append(means[~means.isnan()])

    def since(self) -> dict[str, float]:
        """What to log of the rollouts since the last call; nothing where there was none."""
        groups, self._groups = torch.cat([torch.empty(0), *self._groups]).double(), []
        if not len(groups):
            return {}
        # A single group has no spread: its error is not a number, and is not logged.
        spread = groups.var().item() / len(groups) if len(groups) > 1 else torch.nan
        mean, before = groups.mean().item(), self.first
        if before is None:
            self.first = mean, spread
            return {"reward/delta": 0.0}
        error = (spread + before[1]) ** 0.5
        found = {"reward/delta": mean - before[0]}
        return found if error != error else {**found, "reward/delta_error": error}

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {} if self.first is None else {"first_reward": self.first[0], "first_reward_variance": self.first[1]}

    def load(self, state: dict[str, float]) -> None:
        """Take it; empty for a fresh start."""
        given = "first_reward" in state
        self.first = (state["first_reward"], state["first_reward_variance"]) if given else None
        self._groups = []


class Health(TrainerCallback):
    """Prints a line where logs say that a run learns nothing; each once, until it has passed."""

    def __init__(self) -> None:
        self._begin(0)

    def _begin(self, step: int) -> None:
        self._since: dict[str, int] = {}
        self._said: set[str] = set()
        self._entropy: float | None = None
        self._constant: dict[str, float | None] = {}
        self._step = step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Count from where the run stands."""
        self._begin(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Look at a training log."""
        logs: dict[str, float] = kwargs.get("logs") or {}
        if "loss" in logs and state.is_world_process_zero:
            for line in self.lines(logs, state.global_step):
                logger.warning(f"health: step {state.global_step}: {line}")
            self._step = state.global_step

    def lines(self, logs: dict[str, float], step: int) -> list[str]:
        """What there is to say of a log.

        Args:
            logs: of the steps since the last.
            step: the last of them.
        """
        found = [
            self._lasting(
                "truncated",
                logs.get("completions/clipped_ratio", 0.0) >= 1.0,
                0,
                step,
                "every completion was cut off at max_completion_length, so that the policy ended none. Raise it.",
            ),
            self._lasting(
                "equal",
                logs.get("frac_reward_zero_std", 0.0) > _EQUAL_SHARE,
                _STEPS,
                step,
                f"in more than {_EQUAL_SHARE:.0%} of the groups all rewards have been equal for {_STEPS} steps, and "
                "such groups teach nothing. Take prompts of another difficulty, or a reward with more than two values.",
            ),
            self._lasting(
                "far",
                logs.get("kl", 0.0) > _FAR,
                0,
                step,
                f"the KL divergence from the reference is {logs.get('kl', 0.0):.3g} nats a token. Lower the learning "
                "rate, or raise beta.",
            ),
            self._entropy_line(logs, step),
            *self._constant_lines(logs, step),
        ]
        if "loss" in logs and abs(logs["loss"]) < _NO_LOSS and not logs.get("frac_reward_zero_std", 0.0) >= 1.0:
            usual = "a loss of 0 is normal in the first update of a rollout: advantages have mean 0 and ratios are 1."
            found.append(self._lasting("no loss", True, 0, step, usual))
        return [line for line in found if line]

    def _lasting(self, name: str, holds: bool, steps: int, step: int, line: str) -> str:
        if not holds:
            self._since.pop(name, None)
            self._said.discard(name)
            return ""
        begun = self._since.setdefault(name, self._step)
        if name in self._said or step - begun < steps:
            return ""
        self._said.add(name)
        return line

    def _entropy_line(self, logs: dict[str, float], step: int) -> str:
        entropy = logs.get("entropy")
        if entropy is None:
            return ""
        if self._entropy is None:
            self._entropy = entropy
        low = entropy < _ENTROPY_SHARE * self._entropy
        line = (
            f"the entropy has fallen from {self._entropy:.3g} to {entropy:.3g} nats a token, so that completions of a "
            "prompt are nearly the same. Lower the learning rate, raise epsilon_high or the temperature."
        )
        return self._lasting("entropy", low, 0, step, line)

    def _constant_lines(self, logs: dict[str, float], step: int) -> list[str]:
        """Reward functions that have given one number ever since the start."""
        lines = []
        for key in [key for key in logs if key.startswith("rewards/") and key.endswith("/std")]:
            name = key.removeprefix("rewards/").removesuffix("/std")
            mean = logs.get(f"rewards/{name}/mean")
            held = self._constant.setdefault(name, mean)
            same = held is not None and logs[key] == 0.0 and mean == held
            if not same:
                self._constant[name] = None
            said = f"the reward {name} has been {mean} for every completion from the start. Look at the function."
            lines.append(self._lasting(f"constant {name}", same, _STEPS, step, said))
        return lines
