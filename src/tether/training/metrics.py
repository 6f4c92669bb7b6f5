"""Sums and counts of what is reported, over micro-batches and processes, without waiting for the device.

What was summed since the last log travels in a checkpoint: a resumed run's first log is the unbroken one's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer

from tether.compat.trainer import continue_log, loss_since_log

_WINDOW = "window.json"


class MetricSums:
    """Means over real rows and tokens, whatever the split into micro-batches and processes.

    Of a name whose last part begins or ends with `min` or `max` the smallest or largest value is kept, and no mean.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add one micro-batch's `(sum, count)` by name."""
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.double(), count.double()])
            self._sums[name] = _joined(name, torch.stack([self._sums[name], pair])) if name in self._sums else pair

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes since the last call, by name; forgets them."""
        # A process may have had no rows, and must take part in the sum all the same.
        names = sorted({name for part in gather_object([sorted(self._sums)]) for name in part})
        if not names:
            return {}
        sums = torch.stack([self._sums.get(name, _nothing(name).to(accelerator.device)) for name in names])
        parts = cast(Tensor, accelerator.gather(sums[None]))
        table = torch.stack([_joined(name, parts[:, i]) for i, name in enumerate(names)])
        self._sums = {}
        rows = zip(names, table.tolist(), strict=True)
        return {name: total / (1 if _extreme(name) else count) for name, (total, count) in rows if count}

    def state(self) -> dict[str, list[float]]:
        """What was added in this process since the last call of `means`."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def load_state(self, state: dict[str, list[float]], device: torch.device) -> None:
        """Go on from what `state` returned."""
        self._sums = {name: torch.tensor(pair, dtype=torch.float64, device=device) for name, pair in state.items()}


def sum_and_count(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of values, detached: the parts of a mean over several batches."""
    return values.detach().sum(), torch.tensor(float(len(values)), device=values.device)


def write_window(trainer: Trainer, folder: Path, sums: MetricSums) -> None:
    """Keep losses and metrics since the last log, of every process; all of them call this."""
    last_logged, loss = loss_since_log(trainer)
    found = gather_object([{"last_logged": last_logged, "loss": loss, "sums": sums.state()}])
    if trainer.args.should_save:
        (folder / _WINDOW).write_text(json.dumps(found) + "\n", encoding="utf-8")


def read_window(trainer: Trainer, folder: Path, sums: MetricSums) -> None:
    """Go on from them; on another number of processes the first log is of the steps since the checkpoint."""
    found = json.loads((folder / _WINDOW).read_text(encoding="utf-8")) if (folder / _WINDOW).is_file() else []
    if len(found) == trainer.accelerator.num_processes:
        mine = found[trainer.accelerator.process_index]
        continue_log(trainer, mine["last_logged"], mine["loss"])
        sums.load_state(mine["sums"], trainer.args.device)


def _extreme(name: str) -> str:
    words = name.rpartition("/")[2].split("_")
    return next((word for word in (words[0], words[-1]) if word in ("min", "max")), "")


def _nothing(name: str) -> Tensor:
    value = {"min": torch.inf, "max": -torch.inf}.get(_extreme(name), 0.0)
    return torch.tensor([value, 0.0], dtype=torch.float64)


def _joined(name: str, parts: Tensor) -> Tensor:
    """`(sum, count)` of several, `[parts, 2]`; or their `(extreme, count)`."""
    total = parts.sum(0)
    if not _extreme(name):
        return total
    values = parts[:, 0].amin() if _extreme(name) == "min" else parts[:, 0].amax()
    return torch.stack([values, total[1]])
