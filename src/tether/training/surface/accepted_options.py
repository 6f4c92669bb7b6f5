"""Options of TRL's configurations that need nothing here: they are taken, so that scripts and files run, and said."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from tether.errors import ConfigError
from tether.training.declaration import Declared, option

logger = logging.getLogger("tether")
_PACKED = "rows are packed without padding in any case"


@dataclass
class AcceptedArguments(Declared):
    """What every trainer of TRL has."""

    # Field to why it has no effect; a value in `UNFIT` is refused with what to do.
    WITHOUT_EFFECT: ClassVar[dict[str, str]] = {"padding_free": _PACKED, "pad_to_multiple_of": _PACKED}
    UNFIT: ClassVar[dict[str, tuple[Any, str]]] = {
        "activation_offloading": (
            False,
            "activations are kept by gradient_checkpointing, and max_tokens_per_forward bounds them. Leave it out",
        )
    }

    padding_free: bool = option(False, "TRL's; no effect, rows are never padded.")
    pad_to_multiple_of: int | str | None = option("auto", "TRL's; no effect, rows are never padded.")
    activation_offloading: bool = option(False, "TRL's; stays off.")
    pad_token: str | None = option(
        None, "A token of the vocabulary that tokenizer and model have for padding from now on; unset: theirs."
    )

    def check_accepted(self) -> None:
        """Say which of these options came and do nothing.

        Raises:
            ConfigError: one that asks for what is not done here.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name in self.UNFIT and value != self.UNFIT[field.name][0]:
                raise ConfigError(f"is {value!r}: {self.UNFIT[field.name][1]}.", field.name)
            if field.name in self.WITHOUT_EFFECT:
                logger.info(f"{field.name}: no effect, {self.WITHOUT_EFFECT[field.name]}")


@dataclass
class AcceptedTemplateArguments(AcceptedArguments):
    """What TRL's supervised trainer and its reward trainer have besides."""

    eos_token: str | None = option(None, 'Token that ends an answer; it is also `special_tokens={"eos_token": …}`.')


@dataclass
class AcceptedSupervisedArguments(AcceptedTemplateArguments):
    """What TRL's supervised trainer has besides."""

    WITHOUT_EFFECT: ClassVar[dict[str, str]] = {
        **AcceptedArguments.WITHOUT_EFFECT,
        "packing": _PACKED,
        "packing_strategy": _PACKED,
        "eval_packing": _PACKED,
        "shuffle_dataset": "rows are drawn in random order in any case (train_sampling_strategy)",
    }
    UNFIT: ClassVar[dict[str, tuple[Any, str]]] = {
        **AcceptedTemplateArguments.UNFIT,
        "dataset_text_field": ("text", "rename the column to `text` (in a run file: fields: {text: NAME})"),
        "dataset_kwargs": (None, "rows are prepared by the trainer. Leave it out"),
    }

    packing: bool = option(False, "TRL's; no effect, rows are always packed.")
    packing_strategy: str = option("bfd", "TRL's; no effect, rows are always packed.")
    eval_packing: bool | None = option(None, "TRL's; no effect, rows are always packed.")
    shuffle_dataset: bool = option(False, "TRL's; no effect, `train_sampling_strategy` says it.")
    dataset_text_field: str = option("text", "TRL's; stays `text`.")
    dataset_kwargs: dict[str, Any] | None = option(None, "TRL's; stays unset.")
