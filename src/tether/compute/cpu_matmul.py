"""Float32 matrix products on a processor, by the one of torch's two libraries that is faster there.

Torch multiplies float32 matrices with the BLAS that it was built with, MKL on x86, which leaves half of the rate of
AMD's processors with AVX512 unused. It brings oneDNN along for bfloat16 and convolutions, and offers its float32
products as an operator. Which of the two is used is a setting of the process, as torch's own are; small products,
other dtypes, other devices, autocast and tensors of a kind of their own always go to torch's default.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tether.compat.torch import has_onednn, onednn_linear
from tether.errors import ConfigError

LIBRARIES = ("auto", "default", "onednn")
# Multiplications and additions below which the way to oneDNN costs more than it saves.
LEAST_WORK = 2**21
_PLAIN = (Tensor, nn.Parameter)
_setting = {"library": "default"}


def use_products(library: str) -> None:
    """Set the library of float32 products on the processor, for this process.

    Args:
        library: `default` (torch's BLAS) or `onednn`.

    Raises:
        ConfigError: this build of torch has no oneDNN.
    """
    if library == "onednn" and not has_onednn():
        raise ConfigError(
            f"cpu_matmul is 'onednn', and torch {torch.__version__} was built without it. Set cpu_matmul=default."
        )
    _setting["library"] = library


def products() -> str:
    """The library in use: `default` or `onednn`."""
    return _setting["library"]


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`inputs @ weight.T + bias`, differentiable, as `torch.nn.functional.linear`.

    Args:
        inputs: `[..., K]`.
        weight: `[M, K]`.
        bias: `[M]`.

    Returns:
        `[..., M]`.
    """
    if products() == "onednn" and inputs.dim() > 1 and _fits(inputs, weight, bias):
        # By rows, and shaped outside: what a function of its own returns as a view may not be changed in place, as
        # some models do with a projection.
        found: Tensor = _Product.apply(inputs.flatten(0, -2), weight, bias)  # type: ignore[assignment]
        return found.unflatten(0, inputs.shape[:-1])
    return nn.functional.linear(inputs, weight, bias)


def onednn_product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` by oneDNN, without a derivative; float32 on a processor only."""
    # For a matrix with gaps between its rows oneDNN has no kernel but its reference, which is hundreds of times slower.
    matrix = weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()
    return onednn_linear(inputs, matrix, bias)


class OneDnnLinear(nn.Linear):
    """A linear layer that computes by `product`; its tensors and their names are those of `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return product(input, self.weight, self.bias)


def compute_by_products(model: nn.Module) -> None:
    """Have every plain linear layer inside a model compute by `product`; nothing to do while that is torch's default.

    The class of the layers is changed, and neither their tensors nor their hooks. The head stays as it is, since it is
    read, not called (`tether.scoring.head`).
    """
    if products() == "default":
        return
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            module.__class__ = OneDnnLinear


def _fits(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if inputs.numel() * weight.shape[0] < LEAST_WORK or torch.is_autocast_enabled("cpu"):
        return False
    tensors = [one for one in (inputs, weight, bias) if one is not None]
    return all(
        type(one) in _PLAIN and one.dtype == torch.float32 and one.device.type == "cpu" and one.layout == torch.strided
        for one in tensors
    )


class _Product(torch.autograd.Function):
    """oneDNN's product; its derivatives are products again, so that it can be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        by_inputs, by_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(inputs if by_weight else None, weight if by_inputs else None)
        return onednn_product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (
            None if weight is None else product(grad, weight.t()),
            None if inputs is None else _by_weight(rows, inputs.flatten(0, -2)),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _by_weight(grad: Tensor, inputs: Tensor) -> Tensor:
    """`grad.T @ inputs`, which oneDNN computes several times as fast with the shorter side as its rows (an adapter's 16
    by 1408: 0.7 ms against 2.9)."""
    if inputs.shape[1] < grad.shape[1]:
        return product(inputs.t(), grad.t()).t()
    return product(grad.t(), inputs.t())
