"""Sums and counts of what is reported, over micro-batches and processes, without waiting for the device."""

from __future__ import annotations

from typing import cast

import torch
from accelerate import Accelerator
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
        names = sorted(self._sums)
        if not names:
            return {}
        table = cast(Tensor, accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum"))
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, table.tolist(), strict=True) if count}
