"""Pack examples into a forest: each prompt once, its completions beside each other, no padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tether.errors import ScoringError
from tether.types import Example, Forest, ImageInputs, PerToken, ScoringBatch, Tree


@dataclass
class _Growing:
    """A tree before it has its place in the row: a prompt with its images, and each distinct completion once."""

    number: int
    prompt: Int[Tensor, " P"]
    images: ImageInputs | None = None
    branches: dict[bytes, int] = field(default_factory=dict)
    completions: list[Int[Tensor, " _"]] = field(default_factory=list)

    def branch(self, ids: Int[Tensor, " C"]) -> int:
        """Number of the branch that holds these tokens; a new one if there is none yet."""
        number = self.branches.setdefault(ids.numpy().tobytes(), len(self.completions))
        if number == len(self.completions):
            self.completions.append(ids)
        return number


def pack(examples: Sequence[Example]) -> ScoringBatch:
    """Pack B examples into one row of T tokens.

    A prompt that several examples share is in the row once, and so is a completion that they share.

    Args:
        examples: at least one; each with completions of at least one token, of which at least one is scored, and with a
            prompt of at least one token (it predicts the first completion token) unless no first token is scored. All
            have values of the same names, at each level.

    Returns:
        The batch; completions are numbered in order, so pair i is completions 2i (chosen) and 2i + 1 (rejected).

    Raises:
        ScoringError: no example, an empty prompt although a first token is scored, a completion that is empty or of
            which nothing is scored, or examples with different `values`.
    """
    if not examples:
        raise ScoringError("pack() was given no example; at least one is needed.")
    masks = [mask for example in examples for mask in _scored(example)]
    growing: dict[bytes, _Growing] = {}
    places: list[tuple[int, int]] = []
    for example in examples:
        seen = b"" if example.images is None else example.images.digest
        prompt = seen + example.prompt_ids.numpy().tobytes()
        tree = growing.setdefault(prompt, _Growing(len(growing), example.prompt_ids, example.images))
        places += [(tree.number, tree.branch(ids)) for ids in example.completion_ids]
    images = tuple(tree.images for tree in growing.values())
    pieces, trees = [], []
    for tree in growing.values():
        pieces += [tree.prompt, *tree.completions]
        start = trees[-1].end if trees else 0
        trees.append(Tree(start, len(tree.prompt), tuple(map(len, tree.completions))))
    row = torch.cat(pieces)
    spans = [tree.spans() for tree in trees]
    ends = [(trees[tree].start + trees[tree].trunk, *spans[tree][branch + 1]) for tree, branch in places]
    scored = torch.cat(masks)
    return ScoringBatch(
        input_ids=row[None],
        position_ids=torch.cat([_positions(tree) for tree in trees])[None],
        forest=Forest(tuple(trees)),
        sources=torch.cat([_before(trunk_end, start, end) for trunk_end, start, end in ends])[scored],
        targets=torch.cat([row[start:end] for _, start, end in ends])[scored],
        completion_index=torch.repeat_interleave(torch.tensor([int(mask.sum()) for mask in masks])),
        keys=tuple(key for example in examples for key in example.keys),
        branches=tuple(places),
        examples=tuple(examples),
        values=_by_name(examples, "values", lambda value, _: torch.tensor([float(value)])),
        completion_values=_by_name(examples, "completion_values", lambda value, _: value),
        token_values=_by_name(examples, "token_values", lambda value, masks: torch.cat(value)[torch.cat(masks)]),
        images=images if any(image is not None for image in images) else (),
    )


def _positions(tree: Tree) -> Int[Tensor, " T"]:
    return torch.cat([torch.arange(tree.trunk), *(torch.arange(tree.trunk, tree.trunk + n) for n in tree.branches)])


def _before(trunk_end: int, start: int, end: int) -> Int[Tensor, " C"]:
    """Where the hidden states lie that predict a branch: the trunk's end, then each of its tokens but the last."""
    return torch.cat([torch.tensor([trunk_end - 1]), torch.arange(start, end - 1)])


def _scored(example: Example) -> list[Bool[Tensor, " _"]]:
    lengths = tuple(len(ids) for ids in example.completion_ids)
    if not lengths or min(lengths) == 0:
        raise ScoringError(
            f"Row {example.source_row} has completions of {lengths} tokens; there must be some, each of at least one "
            "token. Drop the row."
        )
    masks = example.scored or tuple(torch.ones(length, dtype=torch.bool) for length in lengths)
    for length, mask in zip(lengths, masks, strict=True):
        if length != len(mask) or not mask.any():
            raise ScoringError(
                f"Row {example.source_row} scores {int(mask.sum())} of {len(mask)} positions of a completion of "
                f"{length} tokens; the mask must have the completion's length and leave at least one token."
            )
        if mask[0] and not len(example.prompt_ids):
            raise ScoringError(
                f"Row {example.source_row} has an empty prompt, and nothing predicts the first token of a completion. "
                "Start the prompt with the tokenizer's BOS token, or leave the first token of each completion unscored."
            )
    return list(masks)


def _by_name(examples: Sequence[Example], level: str, flat: Callable[[Any, list[Tensor]], Tensor]) -> dict[str, Tensor]:
    """The examples' values of one level, joined.

    Args:
        examples: with the same names.
        level: the field that holds them.
        flat: one example's value, and its masks of scored tokens, to a tensor of one dimension.
    """
    held = [getattr(example, level) for example in examples]
    for example, values in zip(examples, held, strict=True):
        if values.keys() != held[0].keys():
            raise ScoringError(
                f"Row {example.source_row} has the {level} {sorted(values)} and the first row of its batch "
                f"{sorted(held[0])}; give every row the same."
            )
    if not held[0]:
        return {}
    masks = [_scored(example) for example in examples]
    found = {}
    for name in held[0]:
        parts = [flat(values[name], mask) for values, mask in zip(held, masks, strict=True)]
        found[name] = torch.cat(parts).float()
    return found


def with_token_values(batch: ScoringBatch, values: Mapping[str, PerToken]) -> tuple[Example, ...]:
    """The examples of a batch, with further numbers of their tokens: what `pack` then joins again.

    Args:
        batch: as `pack` made it.
        values: `[N]` each, by name; tokens that are not scored get 0.

    Example:
        >>> batch = pack([Example.of([1, 5], [[7, 2], [8]], scored=[[False, True], [True]])])
        >>> (example,) = with_token_values(batch, {"reference": torch.tensor([-1.0, -2.0])})
        >>> [part.tolist() for part in example.token_values["reference"]]
        [[0.0, -1.0], [-2.0]]
        >>> pack([example]).token_values["reference"].tolist()
        [-1.0, -2.0]
    """
    masks = [_scored(example) for example in batch.examples]
    lengths = [int(mask.sum()) for group in masks for mask in group]
    parts = {name: iter(tensor.detach().cpu().float().split(lengths)) for name, tensor in values.items()}
    found = []
    for example, group in zip(batch.examples, masks, strict=True):
        new = {
            name: tuple(torch.zeros(len(mask)).masked_scatter(mask, next(part)) for mask in group)
            for name, part in parts.items()
        }
        found.append(replace(example, token_values={**example.token_values, **new}))
    return tuple(found)


def with_prompts(batch: ScoringBatch) -> ScoringBatch:
    """The same batch with its prompts scored too, for losses that take in the whole text.

    The prompts follow the K completions as B further ones; all but the first token of each is scored, and tokens that
    stand for a part of an image are not, as no one writes them.

    Args:
        batch: with K completions for B prompts.

    Returns:
        A batch of K + B completions, of which `branches` names the first K.

    Example:
        >>> batch = with_prompts(pack([Example.of([1, 5, 6], [[7, 2], [8]])]))
        >>> batch.targets.tolist(), batch.completion_index.tolist()
        ([7, 2, 8, 5, 6], [0, 0, 1, 2, 2])
    """
    if batch.token_values or batch.completion_values:
        raise ScoringError(
            "Prompts are scored beside completions, and values by completion or token have none of them."
        )
    row = batch.input_ids[0]
    prompts = [_prompt_sources(batch, tree) for tree in trees_of_examples(batch)]
    sources = torch.cat(prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=row.device)
    numbers = torch.arange(len(prompts), device=row.device) + batch.num_completions
    return replace(
        batch,
        sources=torch.cat([batch.sources, sources]),
        targets=torch.cat([batch.targets, row[sources + 1]]),
        completion_index=torch.cat([batch.completion_index, torch.repeat_interleave(numbers, lengths)]),
        keys=batch.keys + tuple(map(_prompt_key, batch.examples)),
    )


def _prompt_sources(batch: ScoringBatch, number: int) -> Int[Tensor, " M"]:
    """Where the hidden states lie that predict a prompt's text."""
    tree = batch.forest.trees[number]
    sources = torch.arange(tree.start, max(tree.start, tree.start + tree.trunk - 1), device=batch.input_ids.device)
    images = batch.images[number] if batch.images else None
    return sources if images is None else sources[images.token_types[1:] == 0]


def _prompt_key(example: Example) -> bytes:
    seen = b"" if example.images is None else example.images.digest
    return blake2b(b"prompt" + example.prompt_ids.numpy().tobytes() + seen, digest_size=16).digest()


def trees_of_examples(batch: ScoringBatch) -> list[int]:
    """Number of the tree that holds the prompt of each of the B examples."""
    firsts = [0]
    for size in batch.sizes[:-1]:
        firsts.append(firsts[-1] + size)
    return [batch.branches[first][0] for first in firsts]


def sequences(batch: ScoringBatch) -> list[Int[Tensor, " _"]]:
    """The K full sequences of a batch, prompt and completion joined: int64 `[P + C_k]` each.

    Of a batch `with_prompts` the B prompts follow, each alone.
    """
    row, spans = batch.input_ids[0], [tree.spans() for tree in batch.forest.trees]
    parts = [(spans[tree][0], spans[tree][branch + 1]) for tree, branch in batch.branches]
    joined = [torch.cat([row[start:end], row[first:last]]) for (start, end), (first, last) in parts]
    alone = trees_of_examples(batch) if batch.num_completions > len(batch.branches) else ()
    return joined + [row[slice(*spans[tree][0])] for tree in alone]


def sequence_sources(batch: ScoringBatch) -> list[Int[Tensor, " _"]]:
    """For each of the K full sequences, where in it the hidden states lie that predict its scored tokens."""
    # A token's position in its sequence is its position in the tree; a first token is predicted from the trunk's end.
    positions = batch.position_ids[0, batch.sources]
    return list(positions.split(torch.bincount(batch.completion_index, minlength=batch.num_completions).tolist()))


def sequence_counts(batch: ScoringBatch) -> Int[Tensor, " T"]:
    """In how many of the K full sequences each token of the row stands: int64 `[T]`."""
    counts = torch.zeros(batch.forest.length, dtype=torch.long)
    spans = [tree.spans() for tree in batch.forest.trees]
    for tree, branch in batch.branches:
        for start, end in (spans[tree][0], spans[tree][branch + 1]):
            counts[start:end] += 1
    return counts.to(batch.input_ids.device)
