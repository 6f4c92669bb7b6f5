"""Images in a batch: what a vision-language model is given besides token ids, in each layout.

In the tree layout a prompt is in the packed row once, so its images go through the vision tower once, and their
features fall onto its placeholder tokens. The padded layout repeats both for each completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.compat.transformers import image_positions
from tether.errors import ScoringError
from tether.scoring.batch import sequences, trees_of_examples
from tether.types import ImageInputs, ScoringBatch


def has_images(batch: ScoringBatch) -> bool:
    """Whether any prompt of a batch has images."""
    return any(images is not None for images in batch.images)


def tree_images(model: PreTrainedModel, batch: ScoringBatch, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a packed row `[1, T]`, with the images of its prompts."""
    if not has_images(batch):
        return inputs
    types = torch.zeros_like(batch.input_ids)
    for tree, images in zip(batch.forest.trees, batch.images, strict=True):
        if images is not None:
            types[0, tree.start : tree.start + tree.trunk] = images.token_types
    found = {**inputs, **joined_images(batch.images, types)}
    if image_positions(model) is not None:
        found["position_ids"] = _packed_positions(model, batch)
    return found


def padded_images(model: PreTrainedModel, batch: ScoringBatch, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of K padded rows `[K, width]`, with the images of each row's prompt."""
    if not has_images(batch):
        return inputs
    types = torch.zeros_like(inputs["input_ids"])
    repeated = _for_each_sequence(batch)
    for row, images in enumerate(repeated):
        if images is not None:
            types[row, : len(images.token_types)] = images.token_types
    # Positions are the model's own, which it derives from the images.
    return {**inputs, **joined_images(repeated, types)}


def images_alone(batch: ScoringBatch) -> list[dict[str, Tensor]]:
    """For each of the K completions (and the B prompts of a batch `with_prompts`), what its forward is given besides
    ids when it is scored alone."""
    given = []
    lengths = [len(row) for row in sequences(batch)]
    for images, length in zip(_for_each_sequence(batch), lengths, strict=True):
        types = batch.input_ids.new_zeros(1, length)
        if images is not None:
            types[0, : len(images.token_types)] = images.token_types
        given.append(joined_images([images], types))
    return given


def _for_each_sequence(batch: ScoringBatch) -> list[ImageInputs | None]:
    """The images of each row of `sequences(batch)`."""
    trees = [tree for tree, _ in batch.branches]
    trees += trees_of_examples(batch) if batch.num_completions > len(batch.branches) else []
    return [batch.images[tree] if batch.images else None for tree in trees]


def joined_images(images: Sequence[ImageInputs | None], types: Tensor) -> dict[str, Tensor]:
    """The tensors of several prompts behind each other, in the order of their rows; empty where none has images.

    Args:
        images: of each row, None for a row without.
        types: int64 `[rows, width]`, 1 where a token stands for a part of an image.

    Raises:
        ScoringError: images of different shapes, which the processor has not made alike.
    """
    present = [image for image in images if image is not None]
    if not present:
        return {}
    joined = {}
    for name, first in present[0].tensors.items():
        parts = [image.tensors[name] for image in present]
        if any(part.shape[1:] != first.shape[1:] for part in parts):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ScoringError(
                f"The images of one micro-batch have {name} of different shapes ({shapes}), which cannot be joined. "
                "Set per_device_train_batch_size and per_device_eval_batch_size to 1, or let the processor resize "
                "all images alike."
            )
        joined[name] = torch.cat(parts)
    return joined | {name: types for name in present[0].type_names}


def _packed_positions(model: PreTrainedModel, batch: ScoringBatch) -> Tensor:
    """Positions `[3, 1, T]`: of each trunk as the model counts them; a branch goes on after the trunk's largest."""
    parts: list[Tensor] = []
    count: Any = image_positions(model)
    for tree, images in zip(batch.forest.trees, batch.images, strict=True):
        ids = batch.input_ids[:, tree.start : tree.start + tree.trunk]
        if images is None:
            trunk = torch.arange(tree.trunk, device=ids.device).expand(3, 1, -1)
        else:
            trunk, _ = count(ids, **joined_images([images], images.token_types[None]))
        after = trunk.amax() + 1
        branches = [after + torch.arange(length, device=ids.device).expand(3, 1, -1) for length in tree.branches]
        parts += [trunk, *branches]
    return torch.cat(parts, dim=2)
