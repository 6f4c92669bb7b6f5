"""Groups of completions as reward functions see them, as what is trained on, and as figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tether.rewards import Judged
from tether.rollout import Completion, Group, RolloutRequest
from tether.rollout.proof import as_example
from tether.scoring import pack
from tether.types import Example, ScoringBatch

Metrics = dict[str, float]


@dataclass(frozen=True)
class Wanted:
    """This process' share of a rollout: completions in the order of the batches that they are for.

    Args:
        requests: for each batch those of its completions, a prompt at a time.
        number: of the rollout, or `eval`.
        group: completions of each prompt, over all processes.
        conversational: the rows' prompts are messages.
        further: requests of so many prompts that are no part of it, from a place in their order on.
        again: it is the first after a resume, so that it may be on disk already.
    """

    requests: tuple[tuple[RolloutRequest, ...], ...]
    number: int | str
    group: int
    conversational: bool
    further: Callable[[int, int], list[RolloutRequest]] = lambda first, count: []
    again: bool = False


def judge_by(groups: Sequence[Group], texts: Sequence[str], conversational: bool) -> Judged:
    """Completions as reward functions see them: columns of their rows, and fields of their own.

    Args:
        groups: with K completions.
        texts: K.
        conversational: prompts are messages, and so is what is said of a completion.
    """
    flat = [(group, one) for group in groups for one in group.completions]
    names = dict.fromkeys(name for group, one in flat for name in (*group.request.row, *one.fields))
    columns: dict[str, list[Any]] = {
        name: [one.fields.get(name, group.request.row.get(name)) for group, one in flat]
        for name in names
        if name != "prompt"
    }
    columns["finish"] = [one.finish for _, one in flat]
    said: list[Any] = [[{"role": "assistant", "content": text}] for text in texts] if conversational else list(texts)
    return Judged(
        [group.request.row.get("prompt") for group, _ in flat],
        said,
        [one.ids.tolist() for _, one in flat],
        columns,
        [group.request.source_row for group, _ in flat],
    )


def example_of(group: Group, kept: list[bool]) -> Example:
    """A group as an example; what is left out, or written by nobody, is its first token."""
    example = as_example(group)
    masks = example.scored or tuple(torch.ones(len(ids), dtype=torch.bool) for ids in example.completion_ids)
    whole = [keep and bool(mask.any()) for keep, mask in zip(kept, masks, strict=True)]
    ids = tuple(one if keep else one[:1] for one, keep in zip(example.completion_ids, whole, strict=True))
    scored = tuple(mask if keep else torch.ones(1, dtype=torch.bool) for mask, keep in zip(masks, whole, strict=True))
    return replace(example, completion_ids=ids, scored=None if all(map(torch.all, scored)) else scored)


def pairs_of(wanted: Wanted, groups: Sequence[Group], rewards: Tensor, kept: Tensor) -> list[list[Example]]:
    """For each batch the pairs of its groups: the best completion and the worst, the first of several.

    Where no kept completion is better than another, the pair is of two single tokens and weighs nothing; it counts as
    a pair, so that a step's loss is a mean over its prompts.

    Args:
        wanted: whole groups in each batch.
        groups: with K completions.
        rewards: `[K]`, NaN where none applies.
        kept: bool `[K]`, which may be taken.
    """
    rest, found = iter(zip(groups, rewards.view(len(groups), -1), kept.view(len(groups), -1), strict=True)), []
    for batch in wanted.requests:
        examples = []
        for _ in batch:
            group, values, allowed = next(rest)
            allowed = allowed & ~values.isnan()
            best = int(values.masked_fill(~allowed, -torch.inf).argmax())
            worst = int(values.masked_fill(~allowed, torch.inf).argmin())
            weight = float(bool(allowed.any()) and bool(values[best] > values[worst]))
            ids = [group.completions[place].ids for place in (best, worst)]
            masks = [group.completions[place].written for place in (best, worst)]
            if any(mask is not None and not bool(mask.any()) for mask in masks):
                weight = 0.0
            pair = tuple(one if weight else one[:1] for one in ids)
            scored = None
            if weight and any(mask is not None for mask in masks):
                scored = tuple(
                    torch.ones(len(one), dtype=torch.bool) if mask is None else mask
                    for one, mask in zip(pair, masks, strict=True)
                )
            values = {"weight": weight}
            examples.append(replace(as_example(group), completion_ids=pair, values=values, scored=scored))
        found.append(examples)
    return found


def with_values(example: Example, values: Any) -> Example:
    rows = torch.cat([next(values) for _ in example.completion_ids])
    return replace(example, completion_values={"advantage": rows[:, 0], "weight": rows[:, 1]})


def divergence(batch: list[Example]) -> Tensor:
    """`[K]` nats, of each completion: its log-prob under the policy minus that under the reference."""
    packed: ScoringBatch = pack(batch)
    apart = packed.token_values["proximal"] - packed.token_values["reference"]
    return apart.new_zeros(packed.num_completions).index_add(0, packed.completion_index, apart)


def lengths_of(lengths: Tensor, truncated: Tensor) -> Metrics:
    """TRL's figures of how long completions are, before any is left out."""
    ended = lengths[~truncated] if (~truncated).any() else torch.zeros(1)
    found: Metrics = {"completions/clipped_ratio": truncated.float().mean().item()}
    for name, values in (("length", lengths), ("terminated_length", ended)):
        figures = {"mean": values.mean(), "min": values.min(), "max": values.max()}
        found |= {f"completions/{figure}_{name}": value.item() for figure, value in figures.items()}
    return found


def mass_of(completion: Completion) -> float:
    """Mean probability that cuts left to draw a token from; NaN where nothing was cut."""
    return torch.nan if completion.kept is None else completion.kept.mean().item()
