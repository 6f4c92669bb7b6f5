"""From `lora:` or `peft:` to PEFT's configuration, and what `peft:` may hold."""

from __future__ import annotations

import typing
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from tether.config.fields import branches, field_types
from tether.config.model_section import ADAPTERS, Lora, Peft
from tether.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig

# Said elsewhere in a run file, or filled in by PEFT and by Tether.
_OWN = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}
# What needs data, another package, or inputs of its own; a script can still give it.
_APART = {
    "alora_invocation_tokens",
    "layer_replication",
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "tokenizer_kwargs",
    "use_qalora",
    "velora_config",
}
_NARROWED = {"init_lora_weights": bool | Literal["gaussian", "orthogonal", "olora", "pissa"]}
_PLAIN = (bool, int, float, str, list, dict, tuple, set, type(None))


@cache
def adapter_fields(kind: str) -> dict[str, Any]:
    """Type by name of what `peft:` takes for a kind of adapter, `type` aside: what can be written in a run file."""
    return {
        name: _NARROWED.get(name, hint)
        for name, hint in field_types(adapter_class(kind)).items()
        if name not in _OWN | _APART and any(_is_plain(branch) for branch in branches(hint))
    }


def adapter_class(kind: str) -> type[Any]:
    """PEFT's configuration of a kind of adapter."""
    import peft

    return getattr(peft, ADAPTERS[kind])


def adapter_config(lora: Lora | None, peft: Peft | None, *, task: str | None) -> PeftConfig | None:
    """The configuration of a new adapter; None for none.

    Args:
        lora: the section `lora`.
        peft: the section `peft`.
        task: PEFT's name of what the model does; None: as the model's class says.

    Raises:
        ConfigError: PEFT refuses the values together.
    """
    if peft is not None:
        try:
            return adapter_class(peft.type)(task_type=task, **peft.further)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"`peft` is what PEFT refuses: {' '.join(str(error).split())}") from error
    if lora is None:
        return None
    return adapter_class("lora")(
        task_type=task,
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=lora.target,
        target_parameters=lora.target_parameters,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=lora.init,
        modules_to_save=lora.modules_to_save,
    )


def _is_plain(branch: Any) -> bool:
    kind = typing.get_origin(branch) or branch
    return kind is Literal or kind in _PLAIN[:-1]
