"""The fused head: hidden states to log-probabilities in chunks, so that `[N, vocabulary]` never exists as a whole.

A frozen head computes its gradient during the forward, since d log p / d hidden does not depend on what comes after but
for a factor per token: no logits are kept and none are computed twice. A trainable head computes the logits of each
chunk once more in the backward. A head that is not a plain linear layer (an adapter on it, quantised) is called as it
is, chunk by chunk. Where DeepSpeed's stage 3 has the head in shards, it gathers them for a call of the module and for
its backward, so that all chunks are computed within one call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from tether.compat.deepspeed import gathers_itself
from tether.compat.torch import class_under_fsdp, has_forward_hooks
from tether.compute.cpu_matmul import product
from tether.types import PerToken

CHUNK = 256
OUTPUTS = ("entropy", "top1", "mean_logits", "log_collision")


@dataclass(frozen=True)
class Head:
    """A language-model head: `logits = softcap * tanh(scale * (linear(hidden) + shift) / softcap)`, all in float32.

    `shift [vocabulary]` is a constant that the architecture adds to the logits outside the module. What is returned is
    divided by `temperature`: that of the distribution that is asked for, 1 for the model's own.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    shift: Tensor | None = None
    temperature: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether the module is exactly a linear layer, so that its weight may be used directly."""
        if isinstance(self.module, FSDPModule):
            # Gathered by the forward that has just run, and kept until the backward; its hooks are FSDP's own.
            return class_under_fsdp(self.module) is nn.Linear and not isinstance(self.module.weight, DTensor)
        if type(self.module) is not nn.Linear or not self.module.weight.is_floating_point():
            return False
        # DeepSpeed's hooks are how it gathers; anyone else's may change what the module returns.
        return not has_forward_hooks(self.module) or self.is_partitioned

    @property
    def is_partitioned(self) -> bool:
        """Whether DeepSpeed's stage 3 keeps it in shards, so that every process must take part in each call."""
        return gathers_itself(self.module)

    def logits(self, hidden: Float[Tensor, "M hidden_size"]) -> Float[Tensor, "M vocabulary"]:
        """Logits `[M, vocabulary]` in float32 of hidden states `[M, hidden_size]`."""
        raw = self.module(hidden)
        return self.finish(raw if self.shift is None else raw + self.shift.flatten())

    def finish(self, logits: Tensor) -> Tensor:
        """Scale, softcap and temperature of the raw product, in float32."""
        logits = logits.to(_sum_dtype(logits.dtype))
        logits = logits if self.scale == 1.0 else logits * self.scale
        logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def unfinish(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient with respect to the raw product, from the one with respect to the finished `logits`."""
        if self.temperature != 1.0:
            grad, logits = grad / self.temperature, logits * self.temperature
        if self.softcap is not None:
            grad = grad * (1 - (logits / self.softcap) ** 2)
        return grad if self.scale == 1.0 else grad * self.scale


class TokenScores(NamedTuple):
    """Float32 `[N]` each (top1: bool); what was not asked for is None."""

    token_logps: PerToken
    entropy: PerToken | None = None
    top1: Bool[Tensor, " N"] | None = None
    mean_logits: PerToken | None = None
    log_collision: PerToken | None = None


def token_scores(
    head: Head,
    hidden: Float[Tensor, "N hidden_size"],
    targets: Int[Tensor, " N"],
    *,
    outputs: tuple[str, ...] = (),
    chunk: int = CHUNK,
) -> TokenScores:
    """Log-probability of each target under its hidden state.

    Args:
        head: what turns hidden states into logits.
        hidden: `[N, hidden_size]`, on any device.
        targets: int64 `[N]`, on any device.
        outputs: any of `OUTPUTS`; computed without gradient from the same logits.
        chunk: tokens whose logits exist at once; memory is a few times `chunk * vocabulary * 4` bytes.

    Returns:
        One value per token, on the device of the targets; `token_logps` is differentiable in `hidden` and in the head's
        trainable tensors.
    """
    outputs = tuple(dict.fromkeys(outputs))
    weight = next(head.module.parameters(), hidden)
    # A shard may be kept elsewhere than it is computed with.
    place = hidden.device if isinstance(weight, DTensor) else weight.device
    found = _token_scores(head, hidden.to(place), targets.to(place), outputs, chunk)
    logps, *extra = (values.to(targets.device) for values in found)
    return TokenScores(logps, **dict(zip(outputs, extra, strict=True)))


def _token_scores(
    head: Head, hidden: Float[Tensor, "N hidden_size"], targets: Int[Tensor, " N"], outputs: tuple[str, ...], chunk: int
) -> tuple[Tensor, ...]:
    """The log-probabilities and what was asked for beside them, in the order of `outputs`."""
    if head.is_plain:

        def fused(hidden: Tensor) -> Any:
            module: Any = head.module
            bias = module.bias if head.shift is None else _sum(module.bias, head.shift.flatten())
            return _LinearLogProbs.apply(hidden, module.weight, bias, targets, head, outputs, chunk)

        return _called_as(head.module, fused, hidden) if head.is_partitioned else fused(hidden)
    parts, count = [], _number_of_chunks(head, len(targets), chunk)
    for h, t in zip(hidden.tensor_split(count), targets.tensor_split(count), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(_module_scores, head, h, t, outputs, use_reentrant=False))
        else:
            parts.append(_module_scores(head, h, t, outputs))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _called_as(module: Any, forward: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Call a module, hooks included, with another forward: its weights are in place inside it, and in its backward."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        return module(hidden)
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _number_of_chunks(head: Head, tokens: int, chunk: int) -> int:
    """Calls of a head that is computed in parts: the same number on every process, where each call gathers it."""
    count = max(1, -(-tokens // chunk))
    if not head.is_partitioned:
        return count
    most = torch.tensor(count, device=next(head.module.parameters()).device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _module_scores(
    head: Head, hidden: Float[Tensor, "N hidden_size"], targets: Int[Tensor, " N"], outputs: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """The plain form for one chunk: call the head, then an ordinary log-softmax."""
    logits = head.logits(hidden)
    logps = logits.log_softmax(-1)
    with torch.no_grad():
        extra = [_extra(name, logits.detach(), logps.detach().exp(), targets) for name in outputs]
    return logps.gather(-1, targets[:, None])[:, 0], *extra


def _extra(
    name: str, logits: Float[Tensor, "N vocabulary"], probs: Float[Tensor, "N vocabulary"], targets: Int[Tensor, " N"]
) -> Shaped[Tensor, " N"]:
    if name == "top1":
        return logits.argmax(-1) == targets
    if name == "mean_logits":
        return logits.mean(-1)
    if name == "log_collision":
        return probs.square().sum(-1).log()
    # H = log sum exp(logits) - sum p * logits; the first term from one logit and its probability would lose digits.
    return torch.logsumexp(logits, -1) - torch.linalg.vecdot(probs, logits)


class _LinearLogProbs(torch.autograd.Function):
    """Chunked `log_softmax(finish(hidden @ weight.T + bias))[target]` with its own backward."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, head: Head, outputs: tuple[str, ...], chunk: int):  # type: ignore
        trainable = any(ctx.needs_input_grad[1:3])
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not trainable else None
        ctx.head, ctx.chunk, ctx.trainable, ctx.dtype = head, chunk, trainable, _product_dtype(hidden)
        logps = torch.empty(len(targets), dtype=_sum_dtype(hidden.dtype), device=hidden.device)
        extra = {name: torch.empty_like(logps, dtype=torch.bool if name == "top1" else None) for name in outputs}
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(ctx.dtype)
            for rows in _rows(len(targets), chunk):
                logits = _logits(ctx, hidden[rows], matrix, bias)
                top, target = logits.amax(-1, keepdim=True), targets[rows, None]
                picked = logits.gather(-1, target)
                for name in extra.keys() - {"entropy", "log_collision"}:
                    extra[name][rows] = _extra(name, logits, logits, targets[rows])
                # The softcap's derivative needs the logits again; otherwise their memory is reused.
                shifted = logits - top if head.softcap is not None else logits.sub_(top)
                exps = shifted.exp()
                total = exps.sum(-1, keepdim=True)
                logps[rows] = (picked - top - total.log())[:, 0]
                if "entropy" in extra:
                    mean = torch.linalg.vecdot(exps, shifted) / total[:, 0]
                    extra["entropy"][rows] = total.log()[:, 0] - mean
                if "log_collision" in extra:
                    extra["log_collision"][rows] = (exps.square().sum(-1, keepdim=True) / total.square()).log()[:, 0]
                if slope is not None:
                    grad = head.unfinish(_one_hot_minus(exps, total, target), logits)
                    slope[rows] = product(grad.to(ctx.dtype), matrix.T).to(slope.dtype)
        ctx.save_for_backward(*([hidden, weight, bias, targets] if trainable else [slope]))
        ctx.mark_non_differentiable(*extra.values())
        return logps, *extra.values()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps, *_):  # type: ignore
        if not ctx.trainable:
            (slope,) = ctx.saved_tensors
            return (grad_logps[:, None] * slope).to(slope.dtype), None, None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        matrix, wide = weight.to(ctx.dtype), _sum_dtype(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[2] else None
        for rows in _rows(len(targets), ctx.chunk):
            logits = _logits(ctx, hidden[rows], matrix, bias)
            exps = (logits - logits.amax(-1, keepdim=True)).exp()
            grad = _one_hot_minus(exps, exps.sum(-1, keepdim=True), targets[rows, None])
            grad = ctx.head.unfinish(grad.mul_(grad_logps[rows, None]), logits)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = product(grad, matrix.T).to(grad_hidden.dtype)
            if grad_weight is not None:
                grad_weight += product(grad.T, hidden[rows].to(ctx.dtype).T)
        narrow = [g if g is None else g.to(t.dtype) for g, t in ((grad_weight, weight), (grad_bias, bias))]
        return grad_hidden, *narrow, None, None, None, None


def _logits(ctx: Any, hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return ctx.head.finish(product(hidden.to(ctx.dtype), matrix, None if bias is None else bias.to(ctx.dtype)))


def _sum(bias: Tensor | None, shift: Tensor) -> Tensor:
    return shift if bias is None else bias + shift


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What the matrix products run in: autocast's dtype where it is on. Kept for the backward, where it is off."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _rows(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _one_hot_minus(exps: Tensor, total: Tensor, target: Tensor) -> Tensor:
    """Derivative of the picked log-probability by the logits, `onehot - softmax`, written over `exps`."""
    return exps.div_(total).neg_().scatter_add_(-1, target, torch.ones_like(total))
