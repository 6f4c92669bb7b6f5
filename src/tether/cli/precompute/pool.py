"""Workers of Ray Data that fill the store of a run together. Called by `tether precompute --ray N`.

The rows are cut into shards by their numbers, and a worker takes one shard after the other, so that a slow one takes
fewer. The store is all that they share: a shard whose worker was lost is given to another, which finds what the lost
one had written, and computes the rest. Each worker is a run of one process, made of the run file.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tether.errors import ConfigError, StoreError, TetherError
from tether.progress import counted

if TYPE_CHECKING:
    from tether.training.store import StoreFill

# Shards of each worker, so that the others take over from a slow one; of a stream, which every shard reads from its
# beginning, one.
_SHARDS = 8
# Workers that may be lost over one shard, before it is not the machine that is at fault.
_LOSSES = 4


class Worker:
    """A process that fills shards of a store; its trainer is made with the first.

    Args:
        run_file: the run file.
        overrides: see `tether precompute`.
        folder: where relative paths of the run file begin.
        shards: how many there are.
    """

    def __init__(self, run_file: Path, overrides: Sequence[str], folder: Path, shards: int) -> None:
        self._run, self._folder, self._shards = (run_file, list(overrides)), folder, shards
        self._trainer: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Fill one shard.

        Args:
            batch: the shard's number, under `id`, as Ray Data deals it.

        Returns:
            The shard, what was in the store, what was computed; or what went wrong, in words.
        """
        [shard] = map(int, batch["id"])
        try:
            filled = self._made().precompute_reference(part=(shard, self._shards))
        except TetherError as error:
            # As a row: an exception would reach the other side inside one of Ray's, with a traceback for its words.
            return {**_row(shard, 0, 0), "wrong": [str(error)], "code": [error.exit_code]}
        return {**_row(shard, filled.present, filled.computed), "wrong": [""], "code": [0]}

    def _made(self) -> Any:
        if self._trainer is None:
            os.chdir(self._folder)
            from tether.cli.output import terminal_output
            from tether.cli.precompute.store_trainer import trainer_of
            from tether.config import load_run_file

            with terminal_output(debug=False):
                self._trainer = trainer_of(load_run_file(*self._run))
        return self._trainer


def _row(shard: int, present: int, computed: int) -> dict[str, list[Any]]:
    return {"shard": [shard], "present": [present], "computed": [computed]}


def fill_by_workers(run_file: Path, overrides: Sequence[str], workers: int, *, streaming: bool) -> StoreFill:
    """Fill the store of a run by workers on a cluster of Ray, or on this machine.

    Args:
        run_file: the run file; all machines must find it, the rows and the model under the same paths.
        overrides: `key=value`, applied in order.
        workers: how many.
        streaming: the rows are a stream.

    Returns:
        The counts, over all shards.

    Raises:
        ConfigError: Ray Data is not installed, or what a worker said of the run.
        StoreError: what a worker said of the store, or workers were lost over one shard again and again.
    """
    try:
        # By its name, as type checkers do not find what an ordinary installation lacks.
        ray: Any = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--ray needs Ray Data, and {error.name} is not installed. Install it with: pip install 'tether[ray]'; or "
            "start with torchrun, or without both in one process."
        ) from error
    from tether.training.store import StoreFill

    _begin(ray, workers)
    shards = workers * (1 if streaming else _SHARDS)
    own = {"run_file": run_file.resolve(), "overrides": overrides, "folder": Path.cwd(), "shards": shards}
    filled = _dealt(ray, shards, workers, own)
    done: dict[int, StoreFill] = {}
    try:
        with counted("shards of the store", shards, unit="shards") as advance:
            for row in filled.iter_rows():
                if row["wrong"]:
                    raise (ConfigError if row["code"] == ConfigError.exit_code else StoreError)(row["wrong"])
                done[row["shard"]] = StoreFill(row["present"], row["computed"])
                advance(1)
    except ray.exceptions.RayTaskError:
        raise  # an error of what a worker ran, and no loss
    except ray.exceptions.RayError as error:
        raise StoreError(
            f"Workers were lost over the same shard more than {_LOSSES} times, with {len(done)} of {shards} shards "
            f"done. What they computed is stored; the same command computes the rest. Ray says: {error}"
        ) from error
    finally:
        ray.shutdown()
    return StoreFill(sum(one.present for one in done.values()), sum(one.computed for one in done.values()))


def _dealt(ray: Any, shards: int, workers: int, own: dict[str, Any]) -> Any:
    """The rows that workers make of the numbers of shards, once they are asked for."""
    with warnings.catch_warnings():
        # Of the two limits on losses, which have no other place before Ray 2.64.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        return ray.data.range(shards, override_num_blocks=shards).map_batches(
            Worker,
            fn_constructor_kwargs=own,
            batch_size=1,
            # Not more than one at a time: what waits at a slow worker is taken by no other.
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
            max_restarts=-1,
            max_task_retries=_LOSSES,
        )


def _begin(ray: Any, workers: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or begin one on this machine; nothing is reported to Ray's makers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # One more CPU than workers: Ray Data deals the shards' numbers in a task of its own.
    own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers + 1, "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level="ERROR", **own)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
