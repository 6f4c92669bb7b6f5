"""LoRA+ (arXiv:2402.12354): the second matrix of an adapter learns faster than the first. Called by `TetherTrainer`."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from peft.tuners.lora.layer import Embedding
from torch import nn
from torch.optim import Optimizer

from tether.errors import ConfigError
from tether.training.config import PreferenceConfig

_FIELD = "loraplus_lr_ratio"


def check_lora_plus(args: PreferenceConfig, policy: nn.Module, own_optimizer: bool) -> None:
    """Refuse learning rates that would have no effect.

    Args:
        args: of the run.
        policy: with its adapter.
        own_optimizer: the optimizer was passed in.

    Raises:
        ConfigError: there is no second matrix, or the groups of its optimizer are not made here.
    """
    if args.loraplus_lr_ratio is None:
        if args.loraplus_lr_embedding != type(args).loraplus_lr_embedding:
            raise ConfigError(f"is {args.loraplus_lr_embedding}, and {_FIELD} is not given.", "loraplus_lr_embedding")
        return
    sharder = getattr(args, "hf_deepspeed_config", None)
    if own_optimizer or (sharder is not None and "optimizer" in sharder.config):
        raise ConfigError(
            f"is {args.loraplus_lr_ratio}, and the optimizer is not made by the trainer. Give its groups their "
            "learning rates, or leave the optimizer to `optim`.",
            _FIELD,
        )
    if not any(is_second(name) for name, tensor in policy.named_parameters() if tensor.requires_grad):
        raise ConfigError(
            f"is {args.loraplus_lr_ratio}, and no LoRA adapter trains. Give one, or leave it out.", _FIELD
        )


def is_second(name: str) -> bool:
    """Whether a parameter is the second matrix of a LoRA adapter, of a layer or of an embedding.

    >>> is_second("layers.0.q_proj.lora_B.default.weight"), is_second("layers.0.q_proj.lora_A.default.weight")
    (True, False)
    """
    return "lora_B" in name or "lora_embedding_B" in name


def part_rates(optimizer: Optimizer, model: nn.Module, args: PreferenceConfig) -> None:
    """Give the second matrices of an adapter, its embeddings and its vectors their own learning rates.

    What is which is PEFT's rule (`create_loraplus_optimizer`); weight decay stays as the groups had it.

    Args:
        optimizer: before its first step, and before it has a schedule.
        model: whose parameters it has.
        args: of the run.
    """
    faster: dict[int, float] = {}
    rate_of_second = args.learning_rate * (args.loraplus_lr_ratio or 1.0)
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        holder = ".".join(name.split(".")[:-2])
        if holder and isinstance(attrgetter(holder)(model), Embedding):
            faster[id(tensor)] = args.loraplus_lr_embedding
        elif is_second(name) or tensor.ndim == 1:
            faster[id(tensor)] = rate_of_second
    for group in list(optimizer.param_groups):
        parts: dict[float, list[Any]] = {}
        for tensor in group["params"]:
            own = faster.get(id(tensor))
            parts.setdefault(group["lr"] if own is None else own, []).append(tensor)
        group["params"] = parts.pop(group["lr"], [])
        for rate, tensors in parts.items():
            optimizer.add_param_group({**group, "params": tensors, "lr": rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
