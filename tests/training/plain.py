"""What the trainers should do, written out plainly: every sequence in a forward of its own, the model's own logits,
the formulas of the papers, and plain gradient descent. The oracle of the tests of model families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tiny import QUIET

BETA, RATE, STEPS = 0.1, 0.02, 3


def settings(config: type[Any], rows: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Options of plain gradient descent on all rows at once, so that their order does not matter; those among
    `arguments` that are options are taken out of it and set."""
    return {
        "per_device_train_batch_size": rows,
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        **QUIET,
        **{name: arguments.pop(name) for name in list(arguments) if name in config.__dataclass_fields__},
    }


@dataclass
class Row:
    """One prompt as the model is given it, completions as ids, and whether the first is desirable."""

    given: dict[str, Tensor]
    completions: list[list[int]]
    desirable: bool = True


def encoder_decoder_logps(model: Any, row: Row, completion: list[int]) -> Tensor:
    """Log-probabilities of a completion's tokens: the decoder begins with its start token."""
    ids = torch.tensor([completion])
    start = torch.full((1, 1), model.config.decoder_start_token_id)
    logits = model(**row.given, decoder_input_ids=torch.cat([start, ids[:, :-1]], 1), use_cache=False).logits[0]
    return logits.float().log_softmax(-1).gather(-1, ids[0][:, None])[:, 0]


def joined(row: Row, completion: list[int]) -> dict[str, Tensor]:
    """Prompt, with its images, and completion as one sequence."""
    ids, more = row.given["input_ids"], torch.tensor([completion])
    grown = {"input_ids": torch.cat([ids, more], 1)}
    grown["attention_mask"] = torch.ones_like(grown["input_ids"])
    if "mm_token_type_ids" in row.given:
        grown["mm_token_type_ids"] = torch.cat([row.given["mm_token_type_ids"], torch.zeros_like(more)], 1)
    return {**row.given, **grown}


def decoder_logps(model: nn.Module, row: Row, completion: list[int]) -> Tensor:
    """Log-probabilities of a completion's tokens after its prompt."""
    logits = model(**joined(row, completion), use_cache=False).logits[0, row.given["input_ids"].shape[1] - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def rewards(model: nn.Module, row: Row, completion: list[int]) -> Tensor:
    """What a sequence classifier says."""
    return model(**joined(row, completion), use_cache=False).logits[0, 0]


def sft(logps: Any, model: nn.Module, reference: None, rows: list[Row]) -> Tensor:
    """Mean over all tokens."""
    return -torch.cat([logps(model, row, row.completions[0]) for row in rows]).mean()


def orpo(logps: Any, model: nn.Module, reference: None, rows: list[Row]) -> Tensor:
    """Likelihood of the chosen ones, and odds; for models whose prompts have no likelihood."""
    found = [[logps(model, row, completion) for completion in row.completions] for row in rows]
    odds = []
    for chosen, rejected in ([one.mean() for one in pair] for pair in found):
        odds.append(chosen - rejected - torch.log1p(-chosen.exp()) + torch.log1p(-rejected.exp()))
    return -torch.cat([chosen for chosen, _ in found]).mean() - BETA * logsigmoid(torch.stack(odds)).mean()


def kto(logps: Any, model: nn.Module, reference: nn.Module, rows: list[Row]) -> Tensor:
    """Equation 8 of the paper; the divergence from each prompt with the completion of the row before."""
    ratios, others = [], []
    for place, row in enumerate(rows):
        for completion, to in ((row.completions[0], ratios), (rows[place - 1].completions[0], others)):
            with torch.no_grad():
                before = logps(reference, row, completion).sum()
            to.append(logps(model, row, completion).sum() - before)
    z0 = torch.stack(others).detach().mean().clamp(min=0)
    signs = torch.tensor([1.0 if row.desirable else -1.0 for row in rows])
    return (1 - torch.sigmoid(BETA * signs * (torch.stack(ratios) - z0))).mean()


def reward(scores: Any, model: nn.Module, reference: None, rows: list[Row]) -> Tensor:
    """Bradley-Terry."""
    pairs = [[scores(model, row, completion) for completion in row.completions] for row in rows]
    return -torch.stack([logsigmoid(chosen - rejected) for chosen, rejected in pairs]).mean()


def descend(
    loss: Callable[..., Tensor], logps: Any, model: nn.Module, reference: nn.Module | None, rows: list[Row], steps: int
) -> list[float]:
    """Losses of some steps on all rows, and the one after the last; `model` is trained."""
    found = []
    for _ in range(steps):
        value = loss(logps, model, reference, rows)
        value.backward()
        found.append(value.item())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
                    parameter.grad = None
    with torch.no_grad():
        return [*found, loss(logps, model, reference, rows).item()]
