"""Keys of `objective`, `train` and `peft` that are fields of a configuration: which exist and what may stand there."""

from __future__ import annotations

import dataclasses
import typing
from functools import cache
from typing import Any, Literal

import tether.training
from tether.config.sections import ADAPTERS
from tether.config.words import branches, describe_type, field_types, unfit
from tether.objectives import OBJECTIVES, Algorithm, Objective, run_file_row
from tether.training import PreferenceConfig, TetherTrainer
from tether.training.declaration import Text

Loss = str | list[str]
# Fields of transformers that a run file says elsewhere. One place for each thing, so that no two can disagree.
_ELSEWHERE = {
    "output_dir": "output",
    "num_train_epochs": "train.epochs",
    "resume_from_checkpoint": "the option --resume",
    "local_rank": "the launcher (torchrun or accelerate)",
    "do_train": "the command: `tether train` trains",
    "do_eval": "`data.eval`: rows given there are evaluated",
    "do_predict": "`data.eval`: rows given there are evaluated",
}
# PEFT's fields that are said elsewhere in a run file, or filled in by PEFT and by Tether.
_OWN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    "inference_mode",
}
# PEFT's fields that need data, another package, or inputs of their own; a script can still give them.
_APART = {
    *("alora_invocation_tokens", "layer_replication", "loftq_config", "megatron_config", "megatron_core"),
    *("qalora_group_size", "tokenizer_kwargs", "use_qalora", "velora_config"),
}
_NARROWED = {"init_lora_weights": bool | Literal["gaussian", "orthogonal", "olora", "pissa"]}
_PLAIN = (bool, int, float, str, list, dict, tuple, set)


def row_of(loss: Loss) -> Objective | None:
    """The row that a name alone stands for; None for several losses, and for a name that nothing has."""
    return run_file_row(loss) if isinstance(loss, str) else None


def config_class(loss: Loss) -> type[PreferenceConfig]:
    """The configuration of a loss' trainer; of several losses, and of an unknown one, `DPOConfig`."""
    if isinstance(loss, str) and loss in presets():
        return presets()[loss]
    row = row_of(loss)
    wanted = row.algorithm if row else "dpo"
    return next(one for one in _public(PreferenceConfig) if one.preset is None and one.algorithm == wanted)


def trainer_class(loss: Loss) -> type[TetherTrainer]:
    """The trainer of a loss."""
    wanted = config_class(loss)
    own = (one for one in _public(TetherTrainer) if "algorithm_class" in vars(one))
    return next(one for one in own if one.algorithm_class.config is wanted)


def presets() -> dict[str, type[PreferenceConfig]]:
    """Configuration by the name that a run file has for it in place of a loss."""
    return {one.preset: one for one in _public(PreferenceConfig) if one.preset is not None}


def _public(kind: type[Any]) -> list[Any]:
    return [one for one in vars(tether.training).values() if isinstance(one, type) and issubclass(one, kind)]


def losses_by_algorithm() -> dict[Algorithm, list[str]]:
    """Names of losses in a run file."""
    return {name: [row.run_file_key for row in rows.values() if row.run_file_key] for name, rows in OBJECTIVES.items()}


def configs_by_algorithm() -> dict[Algorithm, type[PreferenceConfig]]:
    """The ordinary configuration of an algorithm's losses."""
    losses = losses_by_algorithm()
    return {name: config_class("sigmoid" if name == "dpo" else own[0]) for name, own in losses.items()}


@cache
def keys_of(config: type[PreferenceConfig]) -> dict[str, str]:
    """Where a run file says each field of a configuration: a dotted key, or words."""
    found = {}
    for field in dataclasses.fields(config):
        text = field.metadata.get("help")
        default = _ELSEWHERE.get(field.name, f"train.{field.name}")
        found[field.name] = text.key if isinstance(text, Text) else default
    return found


def fields_under(section: str, config: type[PreferenceConfig]) -> dict[str, str]:
    """Key of a section to the field of a configuration that it stands for, of those that stand for one alone."""
    return {key.rpartition(".")[2]: name for name, key in keys_of(config).items() if key.rpartition(".")[0] == section}


def problem_with(name: str, value: Any, config: type[PreferenceConfig]) -> str | None:
    """What is allowed for a field in place of `value`, as words that complete "allowed is"; None if it may stand."""
    hint = field_types(config)[name]
    text = config.__dataclass_fields__[name].metadata.get("help")
    wrong = unfit(hint, value)
    if wrong is None and isinstance(text, Text):
        return text.listed("null") if text.problem(value) else None
    # No field of transformers that a run file has means anything below zero, and it checks few of them.
    if wrong is None and isinstance(value, (int, float)) and value < 0:
        return f"{describe_type(hint)}, from 0 on"
    return wrong


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


def _is_plain(branch: Any) -> bool:
    kind = typing.get_origin(branch) or branch
    return kind is Literal or kind in _PLAIN
