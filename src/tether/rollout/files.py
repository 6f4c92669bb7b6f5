"""Rollouts on disk: a Parquet file for each and process, written before rewards run; and what replays them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from torch import Tensor, nn

from tether.data.rows.columns import IMAGE_COLUMNS
from tether.errors import RolloutError
from tether.rollout.records import Completion, Group, RolloutRequest, Sampling, as_ids

FOLDER = "rollouts"
_SCHEMA = pa.schema(
    {
        "source_row": pa.int64(),
        "branch": pa.int32(),
        "prompt_ids": pa.list_(pa.int32()),
        "completion_ids": pa.list_(pa.int32()),
        "logps": pa.list_(pa.float32()),
        "written": pa.list_(pa.bool_()),
        "kept": pa.list_(pa.float32()),
        "finish": pa.string(),
        "text": pa.string(),
        "rewards": pa.string(),
        "row": pa.string(),
    }
)


def rollout_file(folder: Path, number: int, process: int) -> Path:
    """Where a process keeps its share of a rollout."""
    return folder / FOLDER / f"{number:06d}-{process}.parquet"


def write_rollout(
    path: Path,
    groups: Sequence[Group],
    texts: Sequence[str],
    *,
    rewards: Sequence[dict[str, float | None]] | None = None,
    engine: str,
    sampling: Sampling,
    weights: Mapping[str, float] | None = None,
) -> None:
    """Write a rollout; a file appears whole or not at all.

    Args:
        path: see `rollout_file`.
        groups: with K completions.
        texts: K, for people.
        rewards: of each completion by function; None before they are known.
        engine: that sampled.
        sampling: how.
        weights: of the rewards, by function.
    """
    flat = [
        (group, branch, one)
        for group in groups
        for branch, one in zip(group.request.branches, group.completions, strict=True)
    ]
    given = rewards if rewards is not None else [{} for _ in flat]
    rows = [
        {
            "source_row": group.request.source_row,
            "branch": branch,
            "prompt_ids": group.prompt.tolist(),
            "completion_ids": one.ids.tolist(),
            "logps": _listed(one.logps),
            "written": _listed(one.written),
            "kept": _listed(one.kept),
            "finish": one.finish,
            "text": text,
            "rewards": json.dumps(reward) if reward else None,
            "row": json.dumps(_without_images(group.request.row), default=str, ensure_ascii=False),
        }
        for (group, branch, one), text, reward in zip(flat, texts, given, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"engine": engine, "sampling": sampling.digest, "weights": json.dumps(dict(weights or {}))}
    table = pa.Table.from_pylist(rows, _SCHEMA).replace_schema_metadata(about)
    whole = path.with_suffix(".unfinished")
    parquet.write_table(table, whole)
    whole.replace(path)


def forget_later(folder: Path, number: int, process: int, processes: int) -> None:
    """Remove what another run left in the folder: rollouts from a number on, which would be read as this run's.

    Args:
        folder: of the run.
        number: of the first rollout that is made now.
        process: whose files are removed; the first one's also removes those of processes that there are no more.
        processes: of the run.
    """
    for path in (folder / FOLDER).glob("[0-9]*-*.parquet"):
        its, owner = map(int, path.stem.split("-"))
        if its >= number and (owner == process or (process == 0 and owner >= processes)):
            path.unlink(missing_ok=True)


def _without_images(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in IMAGE_COLUMNS}


def _listed(values: Tensor | None) -> list[float] | None:
    return None if values is None else values.tolist()


@dataclass(frozen=True)
class Kept:
    """A completion as it lies on disk.

    Args:
        source_row: number of its row in the data.
        branch: its place in the group.
        row: the row's columns, `prompt` among them.
        ids: of its tokens.
        text: the same, decoded.
        finish: `stop` or `length`.
        rewards: by function; empty where none were given yet.
        total: their weighted sum; None where none applies.
    """

    source_row: int
    branch: int
    row: Mapping[str, Any]
    ids: list[int]
    text: str
    finish: str
    rewards: Mapping[str, float | None]
    total: float | None


def kept_rollouts(folder: Path) -> list[int]:
    """Numbers of the rollouts in a run folder.

    Raises:
        RolloutError: there is none.
    """
    found = sorted({int(path.name.split("-")[0]) for path in (folder / FOLDER).glob("[0-9]*-*.parquet")})
    if not found:
        raise RolloutError(f"There are no rollouts in {folder}: give the folder of a run that kept them.")
    return found


def read_rollout(folder: Path, number: int) -> list[list[Kept]]:
    """The completions of a rollout by prompt, of all processes.

    Raises:
        RolloutError: it was not kept.
    """
    groups: dict[int, list[Kept]] = {}
    paths = sorted((folder / FOLDER).glob(f"{number:06d}-*.parquet"))
    if not paths:
        known = kept_rollouts(folder)
        raise RolloutError(f"Rollout {number} is not in {folder}; it has {len(known)}, from {known[0]} to {known[-1]}.")
    for path in paths:
        table = parquet.read_table(path)
        weights = json.loads((table.schema.metadata or {}).get(b"weights", b"{}"))
        for row in table.to_pylist():
            rewards = json.loads(row["rewards"] or "{}")
            known = [value * weights.get(name, 1.0) for name, value in rewards.items() if value is not None]
            total = sum(known) if known else None
            columns, said = json.loads(row["row"]), (row["completion_ids"], row["text"], row["finish"])
            one = Kept(row["source_row"], row["branch"], columns, *said, rewards, total)
            groups.setdefault(one.source_row, []).append(one)
    return [sorted(group, key=lambda one: one.branch) for group in groups.values()]


class ReplayEngine:
    """Gives the completions of an earlier run's folder in place of new ones.

    Args:
        folder: of the earlier run.
    """

    name = "replay"
    embedded = False

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).expanduser()
        if not (self._folder / FOLDER).is_dir():
            raise RolloutError(f"There are no rollouts in {self._folder}: give the folder of a run that kept them.")
        self._number: int | str | None = None
        self._held: dict[tuple[int, int], tuple[list[int], Completion]] = {}
        self._digests: set[str] = set()

    def generate(self, policy: nn.Module, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Group]:
        """The kept completions of each request.

        Raises:
            RolloutError: one was not kept, or its prompt was another.
        """
        found = []
        for request in requests:
            self._load(request.number)
            completions = []
            for branch in request.branches:
                prompt, completion = self._held.get((request.source_row, branch), (None, None))
                if completion is None or prompt != request.prompt_ids.tolist():
                    why = "was not kept" if completion is None else "has another prompt"
                    raise RolloutError(
                        f"Completion {branch} of row {request.source_row} in rollout {request.number} {why} in "
                        f"{self._folder}. Replay with the rows, the seed and the numbers of completions of that run."
                    )
                completions.append(completion)
            found.append(Group(request, tuple(completions)))
        return found

    def has(self, number: int, sampling: Sampling) -> bool:
        """Whether a rollout was kept that was drawn so; it is held from then on, whatever becomes of its files."""
        self._load(number)
        return self._digests == {sampling.digest}

    def _load(self, number: int | str) -> None:
        if number == self._number:
            return
        paths = sorted((self._folder / FOLDER).glob(f"{number:06d}-*.parquet")) if isinstance(number, int) else []
        tables = [parquet.read_table(path) for path in paths]
        self._held = {
            (row["source_row"], row["branch"]): (row["prompt_ids"], _completion(row))
            for table in tables
            for row in table.to_pylist()
        }
        self._digests = {(table.schema.metadata or {}).get(b"sampling", b"").decode() for table in tables}
        self._number = number


def _completion(row: dict[str, object]) -> Completion:
    ids: list[int] = row["completion_ids"]  # type: ignore[assignment]

    def tensor(name: str, dtype: torch.dtype) -> Tensor | None:
        return None if row[name] is None else torch.tensor(row[name], dtype=dtype)

    return Completion(
        as_ids(ids),
        tensor("logps", torch.float32),
        row["finish"],  # type: ignore[arg-type]
        tensor("written", torch.bool),
        tensor("kept", torch.float32),
    )
