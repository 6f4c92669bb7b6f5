"""What `--judge` names: a server that is asked, a function in a file, or a reward model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tether.errors import ConfigError

if TYPE_CHECKING:
    from tether.rewards import PairJudge

_PAIR = ("prompt", "first", "second")


@dataclass(frozen=True)
class Judged:
    """A judge by name.

    Args:
        name: address, `file.py:function` or a reward model's name.
        model: name that the server knows the judge by.
        key: environment variable with the server's key.
    """

    name: str
    model: str | None = None
    key: str | None = None

    def made(self) -> PairJudge:
        """What compares two answers.

        Raises:
            ConfigError: nothing of that name, or a function of other arguments.
        """
        if self.name.startswith(("http://", "https://")):
            from tether.reference.spec import RemoteOptions
            from tether.rewards import EndpointJudge

            return EndpointJudge(RemoteOptions(self.name, model=self.model, api_key_env=self.key))
        if self.model is not None or self.key is not None:
            raise ConfigError(
                f"--judge is {self.name!r}; --judge-model and --judge-key-env belong to a server's address."
            )
        from tether.evaluate.answers.win_rate import RewardJudge
        from tether.rewards import ModelReward

        return self._function() if ".py:" in self.name else RewardJudge(ModelReward(self.name), self.name)

    def _function(self) -> PairJudge:
        """A function of prompt and two answers compares; any other is a reward of prompts and completions."""
        from tether.evaluate.answers.win_rate import RewardJudge
        from tether.rewards import FunctionJudge, python_function

        function = python_function(self.name, "a judge")
        parameters = list(inspect.signature(function).parameters)
        if tuple(parameters) == _PAIR or (len(parameters) == 3 and "completions" not in parameters):
            return FunctionJudge(function)
        if "completions" in parameters:
            return RewardJudge(_with_its_own(function), self.name)
        raise ConfigError(
            f"--judge is {self.name!r}, a function of {', '.join(parameters) or 'nothing'}. It must take prompt, first "
            "and second, or be a reward function of prompts and completions."
        )


def _with_its_own(function):
    """A reward function that is given what it names of prompts and completions."""
    from tether.rewards import Reward

    reward = Reward(function, "judge")
    return lambda prompts, completions: function(**reward.takes({"prompts": prompts, "completions": completions}))
