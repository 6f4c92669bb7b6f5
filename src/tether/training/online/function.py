"""A user's `rollout_func` as an engine: what it returns is checked, and trained on as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tether.errors import RolloutError
from tether.reference.methods.shards import gathered
from tether.rollout import Completion, Group, RolloutRequest, Sampling
from tether.rollout.records import as_ids

_NEEDED = ("prompt_ids", "completion_ids", "logprobs")


class FunctionEngine:
    """Calls `rollout_func(prompts, trainer)`, as in TRL: prompts come once for each of their completions.

    It returns `prompt_ids`, `completion_ids` and `logprobs` (which may be None), and may return `env_mask` (1 for
    tokens that the policy wrote), `finish` (`stop` or `length`), and any further values of completions, which reward
    functions may name.

    Args:
        function: the user's.
        trainer: what it is given.
        ends: tokens that a completion which is not cut off ends in, asked for when completions have come.
    """

    name = "rollout_func"
    embedded = False

    def __init__(self, function: Callable[..., Any], trainer: Any, ends: Callable[[], tuple[int, ...]]) -> None:
        self._function, self._trainer, self._ends = function, trainer, ends

    def generate(self, policy: nn.Module, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Group]:
        """What the function gives.

        Raises:
            RolloutError: something is missing, or does not have the length that it must have; with the field.
        """
        prompts = [request.row.get("prompt") for request in requests for _ in request.branches]
        with gathered(policy):  # it may sample from the policy, and not equally often in each process
            found = self._function(prompts, self._trainer)
        lacking = [name for name in _NEEDED if not isinstance(found, dict) or name not in found]
        if lacking:
            raise RolloutError(
                f"rollout_func returned no {lacking[0]!r}; expected a dictionary with {', '.join(_NEEDED)}."
            )
        fields = {name: values for name, values in found.items() if name not in (*_NEEDED, "env_mask", "finish")}
        for name, values in found.items():
            if values is not None and isinstance(values, (list, tuple)) and len(values) != len(prompts):
                raise RolloutError(
                    f"rollout_func returned {len(values)} {name!r} for {len(prompts)} prompts; expected one each."
                )
        completions = [self._completion(found, fields, number) for number in range(len(prompts))]
        groups, at = [], 0
        for request in requests:
            size = len(request.branches)
            ids = {tuple(found["prompt_ids"][number]) for number in range(at, at + size)}
            if len(ids) > 1:
                raise RolloutError(
                    f"rollout_func returned other 'prompt_ids' for one prompt (row {request.source_row}); "
                    "they must be the same, as completions are compared under one prompt."
                )
            groups.append(Group(request, tuple(completions[at : at + size]), as_ids(list(ids.pop()))))
            at += size
        return groups

    def _completion(self, found: dict[str, Any], fields: dict[str, Any], number: int) -> Completion:
        ids = as_ids(list(found["completion_ids"][number]))
        if not len(ids):
            raise RolloutError(
                f"rollout_func returned no token in completion {number} of 'completion_ids'; expected some."
            )
        logps = self._numbers(found, "logprobs", number, len(ids), torch.float32)
        written = self._numbers(found, "env_mask", number, len(ids), torch.bool)
        finish = found["finish"][number] if found.get("finish") is not None else None
        if finish is None:
            finish = "stop" if int(ids[-1]) in self._ends() else "length"
        if finish not in ("stop", "length"):
            raise RolloutError(f"rollout_func returned {finish!r} in 'finish'; expected stop or length.")
        own = {name: values[number] if isinstance(values, (list, tuple)) else values for name, values in fields.items()}
        return Completion(ids, logps, finish, written, fields=own)

    def _numbers(self, found: dict[str, Any], name: str, number: int, length: int, dtype: torch.dtype) -> Tensor | None:
        values = found.get(name)
        if values is None or values[number] is None:
            return None
        listed = [float("nan") if value is None else value for value in values[number]]
        if len(listed) != length:
            raise RolloutError(
                f"rollout_func returned {len(listed)} numbers in {name!r} for completion {number}, which has {length} "
                "tokens; expected one for each."
            )
        return torch.tensor(listed, dtype=dtype)
