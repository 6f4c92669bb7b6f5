"""Prompts in an order that is a function of seed and epoch, dealt as batches of completions, sampled on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tether.data import example_from_row
from tether.errors import ConfigError, DataError
from tether.rollout import RolloutRequest
from tether.scoring import pack
from tether.training.online.groups import Wanted
from tether.training.source.base import Collate, Source
from tether.training.source.dealing import Order
from tether.types import Example

POSITION = "rollouts.json"
_PROBE_TOKENS = (8, 32)


@dataclass(frozen=True)
class Shape:
    """How completions become batches.

    Args:
        group: completions of each prompt.
        batch: completions of a batch of one process.
        batches: that a rollout gives each process.
        iterations: how often a rollout is trained on.
        processes: that share a rollout.
        process: number of this one.
        seed: of the order of prompts.
        shuffle: whether prompts are drawn in another order in each epoch.
        eval_group: completions of each prompt in evaluation.
        eval_batch: completions of a batch of one process there.
    """

    group: int
    batch: int
    batches: int
    iterations: int
    processes: int
    process: int
    seed: int
    shuffle: bool
    eval_group: int
    eval_batch: int

    @property
    def prompts(self) -> int:
        """Of a rollout, over all processes."""
        return self.batch * self.batches * self.processes // self.group

    @property
    def rounds(self) -> int:
        """Batches of each process until the next rollout."""
        return self.batches * self.iterations

    def order(self, rows: int, epoch: int) -> list[int]:
        """Rows in the order of an epoch; those that do not fill a rollout are left out of it."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(rows, generator=generator).tolist() if self.shuffle else list(range(rows))
        return order[: rows // self.prompts * self.prompts]

    def shares(self, rows: list[int]) -> Iterator[list[tuple[int, range]]]:
        """For each batch of this process the rows of its completions, and which of their groups they are.

        >>> shape = Shape(4, 2, 2, 1, 2, 1, 0, False, 4, 4)
        >>> list(shape.shares([7, 8]))
        [[(8, range(0, 2))], [(8, range(2, 4))]]
        """
        first = self.process * self.batch * self.batches
        for start in range(first, first + self.batch * self.batches, self.batch):
            share, at, end = [], start, start + self.batch
            while at < end:
                upto = min(end, (at // self.group + 1) * self.group)
                share.append((rows[at // self.group], range(at % self.group, at % self.group + upto - at)))
                at = upto
            yield share


class RolloutSource(Source):
    """Prompts, and completions that are sampled when their first batch is wanted.

    Args:
        rows: prepared prompts.
        raw: the rows that they were made of.
        shape: how completions become batches.
        make: samples, judges and scores; see `Experience.make`.
        raw_of: the rows that an evaluation set was made of.
        identity: what a resumed run must have as it was, by name.
        shown: what shows the run's completions and figures.
        most: tokens that a completion may have.
    """

    complete = True
    keeps_position = True

    def __init__(
        self,
        rows: Dataset,
        raw: Dataset,
        shape: Shape,
        make: Callable[[Wanted], list[list[Example]]],
        raw_of: Callable[[Any], Dataset],
        identity: dict[str, Any],
        shown: Sequence[TrainerCallback] = (),
        most: int = _PROBE_TOKENS[1],
    ) -> None:
        self._most = most
        self.rows = self.known = rows
        self._raw, self._shape, self._make, self._raw_of = raw, shape, make, raw_of
        self._identity = {**identity, "prompts": shape.prompts, "batches": shape.batches, "seed": shape.seed}
        if len(rows) < shape.prompts:
            raise DataError(
                f"train: a rollout takes {shape.prompts} prompts and there are {len(rows)}. Give more rows, or lower "
                "per_device_train_batch_size or steps_per_generation."
            )
        self._shown = shown
        self.epoch, self.done = 0, 0
        self._resumed = False  # nothing was sampled since
        self._held: tuple[int, list[list[Example]]] | None = None
        self._loader: _Loader | None = None

    def probe(self, count: int, *, longest: bool = False) -> list[Example]:
        """Real prompts with two completions each, which are draws of tokens that prompts have: none is sampled yet."""
        found = [example_from_row(self.rows[i]) for i in range(min(32, len(self.rows)))]
        found.sort(key=lambda example: len(example.prompt_ids))
        if longest:
            lengths = torch.tensor([len(ids) for ids in self.rows["prompt_ids"]])
            found.insert(0, example_from_row(self.rows[int(lengths.argmax())]))
        # A token that stands for a part of an image would ask for one.
        seen = torch.cat([_text_ids(example) for example in found])
        generator = torch.Generator().manual_seed(0)

        def drawn() -> Tensor:
            length = min(int(torch.randint(*_PROBE_TOKENS, (), generator=generator)), self._most)
            return seen[torch.randint(len(seen), (length,), generator=generator)]

        values = {"advantage": torch.zeros(2), "weight": torch.ones(2)}
        return [
            Example(one.prompt_ids, (drawn(), drawn()), one.source_row, images=one.images, completion_values=values)
            for one in found[:count]
        ]

    def planned(self, order: Order, batches: int) -> Dataset:
        """Refused: no completion is known before it is sampled."""
        raise ConfigError("Completions that the policy samples are not known before, so that nothing can be stored.")

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.rows) // self._shape.prompts * self._shape.rounds

    def loader(self, order: Order, index: int, collate: Collate) -> Any:
        """Deals from where the run stands."""
        self._loader = _Loader(self)
        return self._loader

    def batch(self, epoch: int, place: int) -> list[Example]:
        """The examples of a batch of an epoch; samples the rollout that it is of, if that is not at hand."""
        number, inside = divmod(place, self._shape.rounds)
        rollout = epoch * (len(self) // self._shape.rounds) + number
        if self._held is None or self._held[0] != rollout:
            order, size = self._shape.order(len(self.rows), epoch), self._shape.prompts
            taken = order[number * size : (number + 1) * size]
            wanted = self._wanted(self.rows, self._raw, list(self._shape.shares(taken)), rollout, self._shape.group)
            wanted = replace(wanted, further=self._further(taken, rollout), again=self._resumed)
            self._resumed = False
            self._held = rollout, self._make(wanted)
        return self._held[1][inside % self._shape.batches]

    def _further(self, taken: Sequence[int], rollout: int) -> Callable[[int, int], list[RolloutRequest]]:
        """Prompts that are no part of a rollout, in an order that follows from seed and rollout."""
        generator = torch.Generator().manual_seed(self._shape.seed * 1_000_003 + rollout)
        drawn = torch.randperm(len(self.rows), generator=generator).tolist()
        others = [row for row in drawn if row not in set(taken)]

        def further(first: int, count: int) -> list[RolloutRequest]:
            share = [(row, range(self._shape.group)) for row in others[first : first + count]]
            wanted = self._wanted(self.rows, self._raw, [share], rollout, self._shape.group)
            return list(wanted.requests[0])

        return further

    def _wanted(
        self, rows: Dataset, raw: Dataset, shares: list[list[tuple[int, range]]], number: int | str, group: int
    ) -> Wanted:
        conversational = is_chat(raw)

        def request(place: int, branches: range) -> RolloutRequest:
            prepared = example_from_row(rows[place])
            row = raw[prepared.source_row]
            return RolloutRequest(prepared.prompt_ids, prepared.source_row, branches, number, row, prepared.images)

        requests = tuple(tuple(request(*one) for one in share) for share in shares)
        return Wanted(requests, number, group, conversational)

    def in_order(self, prompts: int) -> Iterator[Wanted]:
        """All rows in their order, so many at a time, each with its whole group; one process has them all."""
        for number, start in enumerate(range(0, len(self.rows), prompts)):
            places = range(start, min(start + prompts, len(self.rows)))
            share = [(place, range(self._shape.group)) for place in places]
            yield self._wanted(self.rows, self._raw, [share], number, self._shape.group)

    def evaluated(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Completions of an evaluation set's prompts, judged; each process has its own prompts, whole groups."""
        rows: Dataset = loader.dataset  # type: ignore[attr-defined]
        shape, raw = self._shape, self._raw_of(rows)
        mine = list(range(shape.process, len(rows), shape.processes))
        most = -(-len(rows) // shape.processes)
        size = max(1, shape.eval_batch // shape.eval_group)
        require_even("eval", len(rows), shape.processes)

        def made(start: int) -> list[Example]:
            part = [(place, range(shape.eval_group)) for place in mine[start : start + size]]
            return self._make(self._wanted(rows, raw, [part], "eval", shape.eval_group))[0]

        # All before the first is scored: sampling takes all processes, and one may have more micro-batches to score.
        for examples in [made(start) for start in range(0, most, size)]:
            yield {"batch": pack(examples)}

    # -- where the run stands ----------------------------------------------------------------------------------------

    def callbacks(self, data: Any, folder: Path, *, main: bool) -> list[TrainerCallback]:
        """`epoch` in logs, which transformers counts from where it resumed; and what shows the run."""
        return [_Progress(self), *self._shown]

    def mark(self) -> tuple[int, int]:
        """Epoch and batches of it that have come."""
        return self.epoch, self.done

    def rewind(self, mark: tuple[int, int]) -> None:
        """See `Source.rewind`."""
        self.epoch, self.done = mark

    def save(self, folder: Path, process: int) -> None:
        """The position; and between two updates of one rollout this process' share of it."""
        if process == 0:
            kept = {"epoch": self.epoch, "batches": self.done, "identity": self._identity}
            (folder / POSITION).write_text(json.dumps(kept) + "\n", "utf-8")
        if self.done % self._shape.rounds and self._held is not None:
            save_file(_tensors(self._held[1]), folder / f"rollout-{process}.safetensors")

    def resume(self, folder: Path, *, skip: bool) -> int:
        """See `Source.resume`.

        Raises:
            ConfigError: rollouts would be others than the run's; or the checkpoint lies between two updates of a
                rollout, of which it has nothing.
        """
        kept = json.loads((folder / POSITION).read_text("utf-8"))
        changed = [name for name, value in self._identity.items() if kept["identity"].get(name) != value]
        if changed:
            said = ", ".join(
                f"{name} {kept['identity'].get(name)!r} then and {self._identity[name]!r} now" for name in changed
            )
            raise ConfigError(
                f"The run is resumed with other rollouts: {said}. Give what it began with; for another reward or loss "
                "on the same completions begin a run with replay_rollouts."
            )
        self._resumed = True
        self.epoch, self.done = kept["epoch"], kept["batches"] if skip else 0
        if self.done == len(self):
            self.epoch, self.done = self.epoch + 1, 0
        number, inside = divmod(self.done, self._shape.rounds)
        if inside:
            path = folder / f"rollout-{self._shape.process}.safetensors"
            if not path.is_file():
                raise ConfigError(f"{folder} lacks {path.name}: resume with as many processes as the run had.")
            examples = [self._with_images(batch) for batch in _examples(load_file(path))]
            self._held = self.epoch * (len(self) // self._shape.rounds) + number, examples
        return self.epoch

    def _with_images(self, batch: list[Example]) -> list[Example]:
        """Images are in no checkpoint: they are read again from the rows."""
        if "images" not in self.rows.column_names:
            return batch
        places = {source: place for place, source in enumerate(self.rows["source_row"])}
        return [replace(one, images=example_from_row(self.rows[places[one.source_row]]).images) for one in batch]


def is_chat(rows: Dataset) -> bool:
    """Whether prompts are messages."""
    return len(rows) > 0 and not isinstance(rows[0].get("prompt"), str)


def require_even(name: str, prompts: int, processes: int) -> None:
    """Refuse an evaluation set of which one process would have more prompts than another.

    Args:
        name: of the set.
        prompts: that it has.
        processes: of the run.

    Raises:
        DataError: with both numbers.
    """
    if prompts % processes:
        raise DataError(
            f"{name}: {prompts} prompts cannot be shared evenly by {processes} processes, which judge them together. "
            "Give a multiple of that."
        )


def _text_ids(example: Example) -> Tensor:
    return example.prompt_ids if example.images is None else example.prompt_ids[example.images.token_types == 0]


class _Loader:
    """What transformers iterates over in place of a `DataLoader`."""

    def __init__(self, source: RolloutSource) -> None:
        self._source = source
        self.dataset = source.rows

    def __len__(self) -> int:
        return len(self._source)

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch with the next iteration."""
        if epoch != self._source.epoch:
            self._source.epoch, self._source.done = epoch, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        source = self._source
        while source.done < len(source):
            batch = source.batch(source.epoch, source.done)
            source.done += 1
            yield {"batch": pack(batch)}


class _Progress(TrainerCallback):
    def __init__(self, source: RolloutSource) -> None:
        self._source = source

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Set it."""
        state.epoch = self._source.epoch + self._source.done / len(self._source)


def _tensors(batches: list[list[Example]]) -> dict[str, Tensor]:
    """All numbers of a rollout, by batch, example and completion."""
    found: dict[str, Tensor] = {}
    for b, batch in enumerate(batches):
        for e, one in enumerate(batch):
            at = f"{b}.{e}"
            found[f"{at}.prompt"] = one.prompt_ids
            found[f"{at}.row"] = torch.tensor(one.source_row)
            for name, value in one.values.items():
                found[f"{at}.values.{name}"] = torch.tensor(value, dtype=torch.float64)
            for name, values in one.completion_values.items():
                found[f"{at}.completion_values.{name}"] = values.clone()
            for k, ids in enumerate(one.completion_ids):
                found[f"{at}.ids.{k}"] = ids.clone()
                if one.scored is not None:
                    found[f"{at}.scored.{k}"] = one.scored[k].clone()
                for name, values in one.token_values.items():
                    found[f"{at}.token_values.{name}.{k}"] = values[k].clone()
    return found


def _examples(found: dict[str, Tensor]) -> list[list[Example]]:
    """What `_tensors` kept."""
    batches: dict[int, dict[int, Example]] = {}
    for key in (key for key in found if key.endswith(".row")):
        at = key.removesuffix(".row")
        b, e = map(int, at.split("."))

        def listed(kind: str, at: str = at) -> tuple[Tensor, ...]:
            numbers = sorted(
                int(name.rpartition(".")[2]) for name in found if name.rpartition(".")[0] == f"{at}.{kind}"
            )
            return tuple(found[f"{at}.{kind}.{k}"] for k in numbers)

        def named(kind: str, at: str = at) -> list[str]:
            front = f"{at}.{kind}."
            return sorted({name.removeprefix(front).split(".")[0] for name in found if name.startswith(front)})

        batches.setdefault(b, {})[e] = Example(
            found[f"{at}.prompt"],
            listed("ids"),
            int(found[key]),
            {name: float(found[f"{at}.values.{name}"]) for name in named("values")},
            scored=listed("scored") or None,
            completion_values={name: found[f"{at}.completion_values.{name}"] for name in named("completion_values")},
            token_values={name: listed(f"token_values.{name}") for name in named("token_values")},
        )
    return [[batches[b][e] for e in sorted(batches[b])] for b in sorted(batches)]
