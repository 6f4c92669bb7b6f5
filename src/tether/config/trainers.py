"""Which trainer the loss of a run file asks for, and what that trainer takes beside what all of them do."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import TYPE_CHECKING, Any

from tether.config.sections import OBJECTIVE_FIELDS, Objective
from tether.errors import ConfigError

if TYPE_CHECKING:
    from tether.training import PreferenceConfig, TetherTrainer

# Losses of other trainers than DPOTrainer: the trainer, and what of its configuration the name stands for.
_TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "kto": ("KTO", {"loss_type": "kto"}),
    "apo_zero_unpaired": ("KTO", {"loss_type": "apo_zero_unpaired"}),
    "bco": ("KTO", {"loss_type": "bco"}),
    "orpo": ("ORPO", {}),
    "cpo": ("CPO", {"loss_type": "sigmoid"}),
    # TRL adds a likelihood to SimPO unless it is told not to; the paper has none.
    "simpo": ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "alphapo": ("CPO", {"loss_type": "alphapo"}),
    "sft": ("SFT", {"loss_type": "nll"}),
    "dft": ("SFT", {"loss_type": "dft"}),
    "reward": ("Reward", {}),
}
Loss = str | list[str]


def trainer_class(loss: Loss) -> type[TetherTrainer]:
    """The trainer of a loss; of several losses, and of all that have no trainer of their own, `DPOTrainer`."""
    import tether.training

    return getattr(tether.training, f"{_name(loss)}Trainer")


def config_class(loss: Loss) -> type[PreferenceConfig]:
    """The configuration of that trainer."""
    import tether.training

    return getattr(tether.training, f"{_name(loss)}Config")


def default_of(loss: Loss, field: str) -> Any:
    """Default of a field of that configuration."""
    return config_class(loss).__dataclass_fields__[field].default


@cache
def _own_fields(name: str) -> dict[str, Any]:
    from tether.training import PreferenceConfig

    shared = {field.name for field in dataclasses.fields(PreferenceConfig)}
    fields = dataclasses.fields(config_class(name))
    return {field.name: field.default for field in fields if field.name not in (*shared, *OBJECTIVE_FIELDS.values())}


def own_fields(loss: Loss) -> dict[str, Any]:
    """What a configuration has beside the fields that all of them have, with its defaults; said in `objective`."""
    return _own_fields(loss if isinstance(loss, str) and loss in _TRAINERS else "sigmoid")


def objective_arguments(objective: Objective) -> dict[str, Any]:
    """The section as arguments of the trainer's configuration.

    Raises:
        ConfigError: a key that the loss makes no use of.
    """
    if _name(objective.loss) == "DPO":
        return objective.arguments
    loss = str(objective.loss)
    given = {name: getattr(objective, name) for name in objective.model_fields_set if name != "loss"}
    idle = sorted(given.keys() - own_fields(loss).keys())
    if idle:
        takes = ", ".join(own_fields(loss)) or "no options"
        raise ConfigError(f"`objective.{idle[0]}` does not apply to loss {loss!r}; it takes {takes}.")
    return {**_TRAINERS[loss][1], **given}


def _name(loss: Loss) -> str:
    return _TRAINERS[loss][0] if isinstance(loss, str) and loss in _TRAINERS else "DPO"
