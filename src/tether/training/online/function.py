"""A user's `rollout_func` as an engine: what it returns is checked, and trained on as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, nan
from typing import Any

import torch
from torch import Tensor, nn

from tether.errors import RolloutError, line_in
from tether.models.structure import transformers_model
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
            RolloutError: it fails, or something is missing, of another length than it must have, or no completion of
                this model; with the field.
        """
        prompts = [request.row.get("prompt") for request in requests for _ in request.branches]
        config: Any = transformers_model(policy).config.get_text_config()
        self._vocabulary, self._places = config.vocab_size, getattr(config, "max_position_embeddings", None)
        with gathered(policy):  # it may sample from the policy, and not equally often in each process
            found = self._called(prompts)
        fields = {name: values for name, values in found.items() if name not in (*_NEEDED, "env_mask", "finish")}
        completions = [self._completion(found, fields, number) for number in range(len(prompts))]
        groups, at = [], 0
        for request in requests:
            size = len(request.branches)
            ids = {tuple(self._ids(found, "prompt_ids", number)) for number in range(at, at + size)}
            if len(ids) > 1:
                raise RolloutError(
                    f"rollout_func returned other 'prompt_ids' for one prompt (row {request.source_row}); "
                    "they must be the same, as completions are compared under one prompt."
                )
            groups.append(Group(request, tuple(completions[at : at + size]), as_ids(list(ids.pop()))))
            at += size
        return groups

    def _called(self, prompts: list[Any]) -> dict[str, Any]:
        """Its answer as plain lists, one value for each prompt in each."""
        try:
            answer = self._function(prompts, self._trainer)
        except (RolloutError, KeyboardInterrupt):
            raise
        except (Exception, SystemExit) as error:
            at = line_in(self._function, error)
            raise RolloutError(f"rollout_func failed: {type(error).__name__}: {error}{at}. Correct it.") from error
        if not isinstance(answer, Mapping):
            raise RolloutError(
                f"rollout_func returned a {type(answer).__name__}; expected a dictionary with {', '.join(_NEEDED)}."
            )
        lacking = [name for name in _NEEDED if name not in answer]
        if lacking:
            raise RolloutError(
                f"rollout_func returned no {lacking[0]!r}; expected a dictionary with {', '.join(_NEEDED)}."
            )
        found = {name: values.tolist() if hasattr(values, "tolist") else values for name, values in answer.items()}
        for name, values in found.items():
            if isinstance(values, (list, tuple)) and len(values) != len(prompts):
                raise RolloutError(
                    f"rollout_func returned {len(values)} {name!r} for {len(prompts)} prompts; expected one each."
                )
        return found

    def _completion(self, found: dict[str, Any], fields: dict[str, Any], number: int) -> Completion:
        ids = self._ids(found, "completion_ids", number)
        whole = len(ids) + len(self._ids(found, "prompt_ids", number))
        if isinstance(self._places, int) and whole > self._places:
            raise RolloutError(
                f"rollout_func returned {whole} tokens of a prompt with completion {number}; the model has places for "
                f"{self._places}. End it earlier."
            )
        logps = self._numbers(found, "logprobs", number, len(ids), "log-probs of at most 0, or None", _is_log_prob)
        written = self._numbers(found, "env_mask", number, len(ids), "0 and 1", lambda one: one in (0, 1))
        finish = found["finish"][number] if found.get("finish") is not None else None
        if finish is None:
            finish = "stop" if ids[-1] in self._ends() else "length"
        if finish not in ("stop", "length"):
            raise RolloutError(f"rollout_func returned {finish!r} in 'finish'; expected stop or length.")
        own = {name: values[number] if isinstance(values, (list, tuple)) else values for name, values in fields.items()}
        mask = None if written is None else written.bool()
        return Completion(as_ids(ids), logps, finish, mask, fields=own)

    def _ids(self, found: dict[str, Any], name: str, number: int) -> list[int]:
        ids = _plain(found[name], number)
        if not ids:
            raise RolloutError(f"rollout_func returned no token in {name!r} of completion {number}; expected some.")
        wrong = [one for one in ids if type(one) is not int or not 0 <= one < self._vocabulary]
        if wrong:
            raise RolloutError(
                f"rollout_func returned {wrong[0]!r} in {name!r} of completion {number}; expected whole numbers from 0 "
                f"to {self._vocabulary - 1}, the model's tokens."
            )
        return ids

    def _numbers(
        self, found: dict[str, Any], name: str, number: int, length: int, allowed: str, fits: Callable[[Any], bool]
    ) -> Tensor | None:
        if found.get(name) is None or found[name][number] is None:
            return None
        listed = _plain(found[name], number)
        if len(listed) != length:
            raise RolloutError(
                f"rollout_func returned {len(listed)} numbers in {name!r} for completion {number}, which has {length} "
                "tokens; expected one for each."
            )
        wrong = [value for value in listed if not fits(value)]
        if wrong:
            raise RolloutError(
                f"rollout_func returned {wrong[0]!r} in {name!r} of completion {number}; expected {allowed}."
            )
        return torch.tensor([nan if value is None else value for value in listed], dtype=torch.float32)


def _plain(values: Any, number: int) -> list[Any]:
    """The values of one completion as a list of plain ones, of whatever they are."""
    one = values[number]
    one = one.tolist() if hasattr(one, "tolist") else one
    return [value.item() if hasattr(value, "item") else value for value in one]


def _is_log_prob(value: Any) -> bool:
    """A number, or nothing: what was not scored."""
    if value is None or value != value:
        return True
    # Rounding may bring one a little above 0.
    return isinstance(value, (int, float)) and -inf < value <= 1e-3
