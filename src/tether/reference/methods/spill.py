"""Tensors on disk while nothing needs them: written once, read back where they are proved to be the same."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tether.errors import ReferencePolicyError
from tether.models.fingerprint import fingerprint

# Left free on the disk: checkpoints and logs of the run need room too.
_MARGIN = 1.1


class Spill:
    """Values of named tensors in a file without a name, which goes with the process, however it ends.

    Nothing is parsed when they come back: names, types and shapes stay in memory, the file has bytes alone.

    Args:
        folder: a folder on the disk that takes the file; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: Any = None  # of tempfile: it has readinto, which IO[bytes] has not
        self._close: Any = lambda: None
        self._layout: dict[str, Tensor] = {}
        self._fingerprint = ""

    def write(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put values on disk; those that are there already are not written again.

        Args:
            tensors: name to values; they have not changed since they were last written, unless `forget` was called.

        Returns:
            The same names with tensors of their shapes and types that take no memory (on the device `meta`).

        Raises:
            OSError: the disk refuses, or has too little room; nothing is left on it then.
        """
        layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
        if self._file is None or not _same(layout, self._layout):
            self.forget()
            self._folder.mkdir(parents=True, exist_ok=True)
            need = sum(tensor.nbytes for tensor in tensors.values())
            free = shutil.disk_usage(self._folder).free
            if need * _MARGIN > free:
                raise OSError(f"{need / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free")
            file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  (it stays open as long as it is needed)
            try:
                for tensor in tensors.values():
                    file.write(_bytes_of(tensor.detach().cpu().contiguous()))
                file.flush()
            except BaseException:
                file.close()
                raise
            self._file, self._layout, self._fingerprint = file, layout, fingerprint(tensors)
            self._close = weakref.finalize(self, file.close)
        return layout

    def read(self) -> dict[str, Tensor]:
        """The values, on the CPU.

        Raises:
            ReferencePolicyError: they are not those that were written.
        """
        found = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in self._layout.items()}
        problem = "nothing was written"
        if self._file is not None:
            try:
                self._file.seek(0)
                complete = all(
                    self._file.readinto(_bytes_of(one)) == one.nbytes for one in found.values() if one.numel()
                )
                problem = "" if complete and fingerprint(found) == self._fingerprint else "its bytes are others now"
            except OSError as error:
                problem = str(error)
        if problem:
            raise ReferencePolicyError(
                f"The snapshot of the reference was on disk in {self._folder} and cannot come back: {problem}. Check "
                "that disk, and resume from the last checkpoint."
            )
        return found

    def forget(self) -> None:
        """Remove what was written."""
        self._close()
        self._file = None


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        (tensor.shape, tensor.dtype) == (second[name].shape, second[name].dtype) for name, tensor in first.items()
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    values: Any = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(values)
