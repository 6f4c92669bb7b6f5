"""Pack examples into a forest: each prompt once, its completions beside each other, no padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tether.errors import ScoringError
from tether.types import Example, Forest, ScoringBatch, Tree


def pack(examples: Sequence[Example]) -> ScoringBatch:
    """Pack B examples into one row of T tokens.

    Args:
        examples: at least one; each with a prompt of at least one token (it predicts the first completion token)
            and completions of at least one token.

    Returns:
        The batch; completions are numbered in order, so pair i is completions 2i (chosen) and 2i + 1 (rejected).

    Raises:
        ScoringError: no example, an empty prompt or an empty completion.
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
    return ScoringBatch(
        input_ids=torch.cat(pieces)[None],
        position_ids=torch.cat(positions)[None],
        forest=Forest(tuple(trees)),
        sources=torch.cat(sources),
        targets=torch.cat(completions),
        completion_index=torch.repeat_interleave(torch.arange(len(completions)), lengths),
        keys=tuple(key for example in examples for key in example.keys),
    )


def _tree(start: int, example: Example) -> Tree:
    branches = tuple(len(ids) for ids in example.completion_ids)
    if len(example.prompt_ids) == 0 or not branches or min(branches) == 0:
        raise ScoringError(
            f"Row {example.source_row} has a prompt of {len(example.prompt_ids)} tokens and completions of "
            f"{branches} tokens; each needs at least one. Start the prompt with the tokenizer's BOS token, or "
            "drop the row."
        )
    return Tree(start, len(example.prompt_ids), branches)


def sequences(batch: ScoringBatch) -> list[Tensor]:
    """The K full sequences of a batch, prompt and completion joined: int64 `[P + C_k]` each."""
    row = batch.input_ids[0]
    joined = []
    for tree in batch.forest.trees:
        (start, end), *branches = tree.spans()
        joined += [torch.cat([row[start:end], row[first:last]]) for first, last in branches]
    return joined


def sequence_sources(batch: ScoringBatch) -> list[Tensor]:
    """For each of the K full sequences, where in it the hidden states lie that predict its completion: `[C_k]`."""
    device = batch.input_ids.device
    return [
        torch.arange(tree.trunk - 1, tree.trunk - 1 + length, device=device)
        for tree in batch.forest.trees
        for length in tree.branches
    ]
