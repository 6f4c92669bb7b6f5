"""A loss, a gradient or a weight that is not finite stops the run before an update or a save makes use of it."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tether.compat.deepspeed import is_away, is_only_copy
from tether.errors import TetherError
from tether.models.structure import trainable_tensors
from tether.reference.methods.shards import local_part
from tether.training.checkpoint import last_checkpoint


class FiniteGuard:
    """Looks at the losses of a step and its gradient before the optimizer does; once a step, whatever is logged.

    Args:
        accelerator: of the run; all processes stop together.
        output_dir: the run folder, whose last checkpoint a message names.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str) -> None:
        self._accelerator, self._output_dir = accelerator, output_dir
        self._bad = torch.zeros((), device=accelerator.device)

    def saw(self, loss: Tensor) -> None:
        """Take note of a loss; nothing waits for its value."""
        self._bad += ~torch.isfinite(loss.detach()).to(self._bad.device).all()

    def check_step(self, grad_norm: Tensor | float | None, step: int) -> None:
        """Stop before the update.

        Args:
            grad_norm: of all gradients; None where something else looks at them (a scaler of float16 skips steps).
            step: the last finished one.

        Raises:
            TetherError: something is not finite, in some process.
        """
        lost, self._bad = self._bad, torch.zeros_like(self._bad)
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm  # of shards: each has a part
        norm = torch.as_tensor(0.0 if norm is None else norm, device=lost.device)
        found = torch.stack([lost.float(), (~torch.isfinite(norm)).float()])
        found = self._all(found)
        if found.any():
            what = "The loss" if found[0] > 0 else "The gradient"
            raise TetherError(
                f"{what} of step {step + 1} is not a number. The update was not made: the weights in memory are those "
                f"of step {step}. Lower the learning rate, clip gradients (max_grad_norm), or train in float32 or "
                f"bfloat16 where float16 overflows.{self._kept()}"
            )

    def check_evaluation(self, loss: float, step: int) -> None:
        """Stop a run whose best model would be chosen by something that is not a number.

        Raises:
            TetherError: the mean loss over an evaluation set, which all processes have, is not finite.
        """
        if not math.isfinite(loss):
            raise TetherError(
                f"The loss of the evaluation at step {step} is {loss}. The policy gives some completion no "
                f"probability, or its weights are wrecked: lower the learning rate, and look at the rows.{self._kept()}"
            )

    def check_weights(self, model: nn.Module, what: str) -> None:
        """Stop before weights are used or saved that are not finite.

        Args:
            model: the policy.
            what: is not done because of it, for the message.

        Raises:
            TetherError: with the name of a tensor.
        """
        # What DeepSpeed keeps on a disk is not read back for this; its losses are looked at.
        tensors = {
            name: tensor
            for name, tensor in trainable_tensors(model).items()
            if not is_away(tensor) or is_only_copy(tensor)
        }
        finite = [torch.isfinite(local_part(tensor)).all().to(self._bad.device) for tensor in tensors.values()]
        if not finite:
            return
        bad = (~torch.stack(finite)).float()
        if self._all(bad.sum()[None]).any():
            name = next((name for name, flag in zip(tensors, bad.tolist(), strict=True) if flag), "one of this run")
            raise TetherError(
                f"{int(bad.sum())} of {len(tensors)} trained tensors, such as {name!r}, have values that are not "
                f"finite; {what}. Lower the learning rate, or clip gradients (max_grad_norm).{self._kept()}"
            )

    def _all(self, flags: Tensor) -> Tensor:
        if self._accelerator.num_processes == 1:
            return flags
        found = self._accelerator.reduce(flags, reduction="sum")
        assert isinstance(found, Tensor)
        return found

    def _kept(self) -> str:
        last = last_checkpoint(self._output_dir)
        return f" The last checkpoint is {last}." if last else " There is no checkpoint yet."
