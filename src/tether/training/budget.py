"""How many tokens a forward may have, and the split of batches into as few micro-batches as fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainingArguments

from tether.compat.accelerate import step_incomplete
from tether.compute.memory import token_budget
from tether.errors import ConfigError
from tether.scoring import pack
from tether.training.step import MicroBatch
from tether.types import ScoringBatch, Tree

logger = logging.getLogger("tether")
Cost = Callable[[Sequence[Tree]], int]


def choose_budget(
    setting: int | str | None, args: TrainingArguments, model: nn.Module, *, coupled: bool, padded: bool
) -> TokenBudget:
    """The budget of a run, said in one line.

    Args:
        setting: `max_tokens_per_forward`.
        args: device and checkpointing.
        model: the policy, on its device.
        coupled: the loss of an example depends on the others of its micro-batch, which must then stay whole.
        padded: whether rows are padded.

    Raises:
        ConfigError: a budget was asked for where batches must stay whole.
    """
    if coupled and isinstance(setting, int):
        raise ConfigError(
            f"max_tokens_per_forward is {setting}, but the loss of an example depends on the others of its "
            "micro-batch, so that another split is another loss. Leave it out, and set the micro-batch with "
            "per_device_train_batch_size."
        )
    checkpointing = bool(args.gradient_checkpointing)
    tokens, line = token_budget(None if coupled else setting, model, args.device, checkpointing=checkpointing)
    logger.info(line)
    return TokenBudget(tokens, padded=padded)


@dataclass
class TokenBudget:
    """Splits batches so that a forward computes at most `tokens` tokens.

    Args:
        tokens: None: batches stay whole.
        padded: rows are padded, so that a forward computes its widest sequence once for each sequence.
    """

    tokens: int | None
    padded: bool = False

    def split(self, batch: ScoringBatch, accelerator: Accelerator | None = None) -> list[MicroBatch]:
        """The micro-batches of a batch, the largest first.

        Their examples are those of the batch, each once. A batch that fits stays as it is, and an example that alone
        is over the budget is a micro-batch of its own.

        Args:
            batch: this process' examples.
            accelerator: of processes that must all make the same number of forwards; every one has to call. None: this
                process may make as many as it needs.
        """
        if self.tokens is None:
            return [MicroBatch(batch)]
        # Examples that share a prompt are counted with one each: an estimate from above, and simple.
        trees = [Tree(0, len(one.prompt_ids), tuple(map(len, one.completion_ids))) for one in batch.examples]
        cost = padded_tokens if self.padded else packed_tokens
        groups = fewest_groups(trees, self.tokens, cost)
        self._say_what_is_over(trees, cost)
        count = len(groups) if accelerator is None else _largest(len(groups), accelerator)
        groups, repeats = even_out(groups, trees, count, cost)
        if len(groups) == 1 and not repeats:
            return [MicroBatch(batch)]
        parts = [MicroBatch(_some(batch, group)) for group in groups]
        return parts + [MicroBatch(_some(batch, group), counts=False) for group in repeats]

    def _say_what_is_over(self, trees: Sequence[Tree], cost: Cost) -> None:
        longest = max(cost([tree]) for tree in trees)
        if longest > (self.tokens or 0) and not getattr(self, "_said", False):
            self._said = True
            logger.warning(
                f"batching: one example has {longest} tokens, more than the {self.tokens} of max_tokens_per_forward; "
                "such examples are computed alone. This is said once."
            )


def _some(batch: ScoringBatch, group: Sequence[int]) -> ScoringBatch:
    return pack([batch.examples[i] for i in group])


def packed_tokens(trees: Sequence[Tree]) -> int:
    """Tokens of a row of trees: each prompt once, and all its completions."""
    return sum(tree.end - tree.start for tree in trees)


def padded_tokens(trees: Sequence[Tree]) -> int:
    """Tokens of a padded batch of all full sequences."""
    width = max(tree.trunk + max(tree.branches) for tree in trees)
    return width * sum(len(tree.branches) for tree in trees)


def fewest_groups(trees: Sequence[Tree], budget: int, cost: Cost = packed_tokens) -> list[list[int]]:
    """Put trees into as few groups as first-fit decreasing, or an even filling, needs.

    The longest first: each goes to the first group it fits in, and to a new one where it fits in none. With that number
    of groups, or fewer, each is then put into the emptiest one; where that fits, groups are about equally large.

    Args:
        trees: what is put into groups.
        budget: largest cost of a group; one tree alone may be over it.
        cost: of a group.

    Returns:
        Indices of `trees`, ascending in each group; the largest group first.

    Example:
        >>> trees = [Tree(0, 0, (length,)) for length in (4, 7, 5, 2)]
        >>> fewest_groups(trees, 9)
        [[0, 2], [1, 3]]
    """

    def size(group: Sequence[int]) -> int:
        return cost([trees[i] for i in group]) if group else 0

    order = sorted(range(len(trees)), key=lambda i: (-size([i]), i))
    groups: list[list[int]] = []
    for i in order:
        fitting = next((group for group in groups if size([*group, i]) <= budget), None)
        if fitting is None:
            groups.append([i])
        else:
            fitting.append(i)
    for count in range(max(1, -(-packed_tokens(trees) // budget)), len(groups) + 1):
        even: list[list[int]] = [[] for _ in range(count)]
        for i in order:
            min(even, key=lambda group, i=i: size([*group, i])).append(i)
        if all(size(group) <= budget or len(group) == 1 for group in even):
            groups = even
            break
    return sorted((sorted(group) for group in groups if group), key=lambda group: (-size(group), group))


def even_out(
    groups: list[list[int]], trees: Sequence[Tree], count: int, cost: Cost = packed_tokens
) -> tuple[list[list[int]], list[list[int]]]:
    """Make `count` groups of fewer: the largest are divided, and when each tree stands alone the shortest is repeated.

    Args:
        groups: as `fewest_groups` returns them, at most `count`.
        trees: what the indices mean.
        count: groups that are needed.
        cost: of a group.

    Returns:
        The groups, the largest first, and the repetitions.

    Example:
        >>> trees = [Tree(0, 1, (length,)) for length in (4, 7, 5)]
        >>> even_out([[0, 1, 2]], trees, 2)
        ([[0, 2], [1]], [])
        >>> even_out([[0, 1, 2]], trees, 4)
        ([[1], [2], [0]], [[0]])
    """

    def size(group: Sequence[int]) -> int:
        return cost([trees[i] for i in group])

    groups = list(groups)
    while len(groups) < count:
        largest = max((group for group in groups if len(group) > 1), key=size, default=None)
        if largest is None:
            break
        groups.remove(largest)
        halves: tuple[list[int], list[int]] = [], []
        for i in sorted(largest, key=lambda i: (-size([i]), i)):
            min(halves, key=lambda half: size(half) if half else 0).append(i)
        groups += [sorted(half) for half in halves]
    shortest = min(range(len(trees)), key=lambda i: size([i]))
    repeats = [[shortest] for _ in range(count - len(groups))]
    return sorted(groups, key=lambda group: (-size(group), group)), repeats


@contextmanager
def accumulate_only(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside, a backward adds to this process' gradients; those of all processes are not combined, and no step is made.

    DeepSpeed combines them when it is told that a step is complete, which `step_incomplete` decides too.
    """
    by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    with step_incomplete(accelerator), nullcontext() if by_deepspeed else accelerator.no_sync(model=model):
        yield


Item = TypeVar("Item")


def joined(items: Iterable[Item], accelerator: Accelerator, *, together: bool) -> Iterator[Item | None]:
    """The items of this process, and None for as long as another process still has some.

    A forward of a policy in shards gathers them, so that all processes must make equally many.

    Args:
        items: of this process.
        accelerator: of the processes; each has to call.
        together: whether forwards have to be joined; otherwise the items are all there is.

    Example:
        >>> list(joined("ab", Accelerator(), together=True))
        ['a', 'b']
    """
    if not together:
        yield from items
        return
    left = iter(items)
    while _largest(int((item := next(left, None)) is not None), accelerator):
        yield item


def _largest(count: int, accelerator: Accelerator) -> int:
    """The largest count of all processes."""
    if accelerator.num_processes == 1:
        return count
    counts = accelerator.gather(torch.tensor([count], device=accelerator.device))
    return int(counts.max()) if isinstance(counts, Tensor) else count
