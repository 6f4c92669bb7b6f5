"""Sums and counts of what is reported, over micro-batches and processes, without waiting for the device."""

from __future__ import annotations

from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


class MetricSums:
    """Means over real rows and tokens, whatever the split into micro-batches and processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add one micro-batch's `(sum, count)` by name."""
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.double(), count.double()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes since the last call, by name; forgets them."""
        # A process may have had no rows, and must take part in the sum all the same.
        names = sorted({name for part in gather_object([sorted(self._sums)]) for name in part})
        if not names:
            return {}
        nothing = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        sums = torch.stack([self._sums.get(name, nothing) for name in names])
        table = cast(Tensor, accelerator.reduce(sums, reduction="sum"))
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, table.tolist(), strict=True) if count}
