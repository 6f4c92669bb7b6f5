"""Pack examples into a forest: each prompt once, its completions beside each other, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import torch
from torch import Tensor

from tether.errors import ScoringError
from tether.types import Example, Forest, ScoringBatch, Tree


def pack(examples: Sequence[Example]) -> ScoringBatch:
    """Pack B examples into one row of T tokens.

    Args:
        examples: at least one; each with a prompt of at least one token (it predicts the first completion token)
            and completions of at least one token, of which at least one is scored. All have the same `values`.

    Returns:
        The batch; completions are numbered in order, so pair i is completions 2i (chosen) and 2i + 1 (rejected).

    Raises:
        ScoringError: no example, an empty prompt, a completion that is empty or of which nothing is scored, or examples
            with different `values`.
    """
    if not examples:
        raise ScoringError("pack() was given no example; at least one is needed.")
    trees: list[Tree] = []
    pieces: list[Tensor] = []
    positions: list[Tensor] = []
    sources: list[Tensor] = []
    for example in examples:
        tree = _tree(trees[-1].end if trees else 0, example)
        trees.append(tree)
        pieces += [example.prompt_ids, *example.completion_ids]
        positions.append(torch.arange(tree.trunk))
        (_, trunk_end), *branches = tree.spans()
        for start, end in branches:
            positions.append(torch.arange(tree.trunk, tree.trunk + end - start))
            sources += [torch.tensor([trunk_end - 1]), torch.arange(start, end - 1)]
    completions = [ids for example in examples for ids in example.completion_ids]
    lengths = torch.tensor([len(ids) for ids in completions])
    scored = torch.cat([mask for example in examples for mask in _scored(example)])
    return ScoringBatch(
        input_ids=torch.cat(pieces)[None],
        position_ids=torch.cat(positions)[None],
        forest=Forest(tuple(trees)),
        sources=torch.cat(sources)[scored],
        targets=torch.cat(completions)[scored],
        completion_index=torch.repeat_interleave(torch.arange(len(completions)), lengths)[scored],
        keys=tuple(key for example in examples for key in example.keys),
        values=_values(examples),
    )


def _scored(example: Example) -> list[Tensor]:
    masks = example.scored or tuple(torch.ones(len(ids), dtype=torch.bool) for ids in example.completion_ids)
    for ids, mask in zip(example.completion_ids, masks, strict=True):
        if len(ids) != len(mask) or not mask.any():
            raise ScoringError(
                f"Row {example.source_row} scores {int(mask.sum())} of {len(mask)} positions of a completion of "
                f"{len(ids)} tokens; the mask must have the completion's length and leave at least one token."
            )
    return list(masks)


def _values(examples: Sequence[Example]) -> dict[str, Tensor]:
    names = examples[0].values.keys()
    for example in examples:
        if example.values.keys() != names:
            raise ScoringError(
                f"Row {example.source_row} has the values {sorted(example.values)} and the first row of its batch "
                f"{sorted(names)}; give every row the same."
            )
    return {name: torch.tensor([float(example.values[name]) for example in examples]) for name in names}


def _tree(start: int, example: Example) -> Tree:
    branches = tuple(len(ids) for ids in example.completion_ids)
    if len(example.prompt_ids) == 0 or not branches or min(branches) == 0:
        raise ScoringError(
            f"Row {example.source_row} has a prompt of {len(example.prompt_ids)} tokens and completions of "
            f"{branches} tokens; each needs at least one. Start the prompt with the tokenizer's BOS token, or "
            "drop the row."
        )
    return Tree(start, len(example.prompt_ids), branches)


def with_prompts(batch: ScoringBatch) -> ScoringBatch:
    """The same batch with its prompts scored too, for losses that take in the whole text.

    The prompts follow the K completions as B further ones; all but the first token of each is scored.

    Args:
        batch: with K completions for B prompts.

    Returns:
        A batch of K + B completions.

    Example:
        >>> batch = with_prompts(pack([Example.of([1, 5, 6], [[7, 2], [8]])]))
        >>> batch.targets.tolist(), batch.completion_index.tolist()
        ([7, 2, 8, 5, 6], [0, 0, 1, 2, 2])
    """
    spans = [tree.spans()[0] for tree in batch.forest.trees]
    sources = torch.cat([torch.arange(start, end - 1) for start, end in spans])
    lengths = torch.tensor([end - start - 1 for start, end in spans])
    index = torch.repeat_interleave(torch.arange(len(spans)) + batch.num_completions, lengths)
    row = batch.input_ids[0]
    prompts = (b"prompt" + row[start:end].numpy().tobytes() for start, end in spans)
    return replace(
        batch,
        sources=torch.cat([batch.sources, sources]),
        targets=torch.cat([batch.targets, row[sources + 1]]),
        completion_index=torch.cat([batch.completion_index, index]),
        keys=batch.keys + tuple(blake2b(prompt, digest_size=16).digest() for prompt in prompts),
    )


def _scored_trunks(batch: ScoringBatch, branches: int) -> list[tuple[int, int]]:
    scored = batch.num_completions > branches
    return [tree.spans()[0] for tree in batch.forest.trees] if scored else []


def sequences(batch: ScoringBatch) -> list[Tensor]:
    """The K full sequences of a batch, prompt and completion joined: int64 `[P + C_k]` each.

    Of a batch `with_prompts` the prompts follow, each alone.
    """
    row = batch.input_ids[0]
    joined = []
    for tree in batch.forest.trees:
        (start, end), *branches = tree.spans()
        joined += [torch.cat([row[start:end], row[first:last]]) for first, last in branches]
    return joined + [row[start:end] for start, end in _scored_trunks(batch, len(joined))]


def sequence_sources(batch: ScoringBatch) -> list[Tensor]:
    """For each of the K full sequences, where in it the hidden states lie that predict its scored tokens."""
    # A token's position in its sequence is its position in the tree; a first token is predicted from the trunk's end.
    positions = batch.position_ids[0, batch.sources]
    return list(positions.split(torch.bincount(batch.completion_index, minlength=batch.num_completions).tolist()))
