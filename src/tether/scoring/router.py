"""The load-balancing loss of mixture-of-experts models, over the sequences that a layout computes."""

from __future__ import annotations

from jaxtyping import Float, Num
from torch import Tensor
from transformers import PreTrainedModel

from tether.compat.transformers import router_loss
from tether.errors import ConfigError


def has_router(model: PreTrainedModel) -> bool:
    """Whether the architecture can return its routers' logits."""
    return hasattr(model.config.get_text_config(), "output_router_logits")


def lacking_router(model: PreTrainedModel) -> str:
    """Why an architecture has no load-balancing loss, as far as its code says so; empty where it may have one."""
    if not has_router(model):
        return f"{type(model).__name__} has no experts to balance"
    if router_loss(model) is None:
        return f"transformers computes no load-balancing loss for {type(model).__name__}"
    return ""


def load_balancing_loss(
    model: PreTrainedModel, router_logits: tuple[Tensor, ...], weights: Num[Tensor, "rows columns"]
) -> Float[Tensor, ""]:
    """`E * sum_e f_e P_e`, the architecture's own function, over real tokens and all layers.

    `f_e` is the share of tokens that are sent to expert e, `P_e` the mean probability that its router gives it. A token
    that stands in several sequences counts once for each: the packed row then gives exactly what padded rows give.

    Args:
        model: the transformers model whose forward gave the logits.
        router_logits: one `[tokens, experts]` for each layer with experts.
        weights: `[rows, columns]`, how often each token counts; 0 for padding.

    Raises:
        ConfigError: the architecture has no such function.

    Reference:
        Fedus et al., Switch Transformers, equations 4 to 6, arXiv:2101.03961.
    """
    loss = router_loss(model)
    if loss is None:
        raise ConfigError(
            f"{type(model).__name__} has no load-balancing loss that is known here. Set router_aux_loss_coef to 0."
        )
    return loss(router_logits, attention_mask=weights)
