"""Names that TRL and transformers had for options and have no more: what becomes of each, in one table.

Files and scripts that are older than the installed libraries still say them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from tether.errors import ConfigError

logger = logging.getLogger("tether")
_ANYTHING = object()


@dataclass(frozen=True)
class Retired:
    """What becomes of a name.

    Args:
        becomes: the field that its value is given to; None: none.
        harmless: the value that said what is the case anyway; another one is refused. Left out: every value is.
        advice: what to write in its place, for a value that is refused; empty: none is.
    """

    becomes: str | None = None
    harmless: Any = _ANYTHING
    advice: str = ""

    @property
    def never_matters(self) -> bool:
        """Whether every value of it has no effect any more."""
        return self.becomes is None and self.harmless is _ANYTHING


def _gone(harmless: Any = _ANYTHING, advice: str = "") -> Retired:
    return Retired(None, harmless, advice)


_LENGTH = (
    "max_length is of prompt and completion together, and truncation_mode says what is kept of a longer sequence; "
    "leave it out"
)
_FSDP = "give it as a key of fsdp_config"
RETIRED: dict[str, Retired] = {
    # TRL
    "max_prompt_length": _gone(None, _LENGTH),
    "max_completion_length": _gone(None, _LENGTH),
    "max_target_length": _gone(None, _LENGTH),
    "max_seq_length": Retired("max_length"),
    # of TRL's OnlineDPOConfig
    "max_new_tokens": Retired("max_completion_length"),
    "missing_eos_penalty": _gone(None, "take it off in a reward function of your own, which is given the completions"),
    "reward_model_path": _gone(None, "name that model in reward_funcs"),
    "rpo_alpha": _gone(None, "set loss_type=['sigmoid', 'sft'] and loss_weights=[1.0, rpo_alpha]"),
    "reference_free": _gone(False, "set reference='none'"),
    "force_use_ref_model": _gone(),
    "ref_adapter_name": Retired("reference_adapter"),
    "model_adapter_name": _gone(None, "activate that adapter with model.set_adapter(name) before you pass the model"),
    "is_encoder_decoder": _gone(),
    "label_pad_token_id": _gone(),
    "padding_value": _gone(),
    "use_logits_to_keep": _gone(),
    "use_num_logits_to_keep": _gone(),
    "generate_during_eval": _gone(False, "add tether.trl.LogCompletionsCallback(trainer)"),
    "tools": _gone(None, "give them as a column `tools` of the rows"),
    "dpo_beta": Retired("beta"),
    "model_init_kwargs_ref": Retired("ref_model_init_kwargs"),
    "base_model_attribute_name": _gone(),
    "dataset_batch_size": _gone(),
    "num_of_sequences": _gone(),
    "chars_per_token": _gone(),
    "use_liger": _gone(False, "leave it out: logits are never built here in any case"),
    "use_liger_loss": _gone(False, "leave it out: logits are never built here in any case"),
    # transformers
    "warmup_ratio": Retired("warmup_steps"),
    "evaluation_strategy": Retired("eval_strategy"),
    "no_cuda": Retired("use_cpu"),
    "per_gpu_train_batch_size": Retired("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Retired("per_device_eval_batch_size"),
    "push_to_hub_model_id": Retired("hub_model_id"),
    "push_to_hub_token": Retired("hub_token"),
    "push_to_hub_organization": _gone(None, "write it before the name in hub_model_id: organization/name"),
    "overwrite_output_dir": _gone(),
    "logging_dir": _gone(None, "set TENSORBOARD_LOGGING_DIR in the environment"),
    "save_safetensors": _gone(True, "leave it out: weights are saved as safetensors"),
    "group_by_length": _gone(False, "leave it out: rows are packed, so that length costs nothing"),
    "include_tokens_per_second": _gone(),
    "include_inputs_for_metrics": _gone(False, "pass compute_metrics; it gets log-probs and rewards"),
    "past_index": _gone(-1, "leave it out"),
    "fp16_backend": _gone(),
    "half_precision_backend": _gone(),
    "fp16_opt_level": _gone(),
    "use_mps_device": _gone(),
    "use_ipex": _gone(False, "leave it out"),
    "jit_mode_eval": _gone(False, "leave it out"),
    "torchdynamo": Retired("torch_compile_backend"),
    "ray_scope": _gone(),
    "mp_parameters": _gone("", "leave it out"),
    "sharded_ddp": _gone("", "use fsdp"),
    "fsdp_min_num_params": _gone(0, _FSDP),
    "fsdp_transformer_layer_cls_to_wrap": _gone(None, _FSDP),
    "tpu_num_cores": _gone(None, "leave it out"),
    "tpu_metrics_debug": _gone(False, "leave it out"),
    "dispatch_batches": _gone(None, "set it in accelerator_config"),
    "split_batches": _gone(None, "set it in accelerator_config"),
    "predict_with_generate": _gone(False, "add tether.trl.LogCompletionsCallback(trainer)"),
}


def translated(given: dict[str, Any], fields: set[str]) -> dict[str, Any]:
    """Options with older names turned into those of today, and said.

    Args:
        given: options by name, as a script gives them.
        fields: names that exist; they are left as they are.

    Raises:
        ConfigError: a name that means something else today, or nothing, with what to write.
    """
    found = {name: value for name, value in given.items() if name in fields or name not in RETIRED}
    for name in given.keys() - found.keys():
        old, value = RETIRED[name], given[name]
        if old.becomes is not None and old.becomes in fields:
            if old.becomes in given:
                raise ConfigError(
                    f"is the older name of {old.becomes}, which was given too. Leave one of them out.", name
                )
            logger.info(f"{name}: taken as {old.becomes}, as it is called now")
            found[old.becomes] = value
        elif old.becomes is not None:
            raise ConfigError(f"is the older name of {old.becomes}, which this configuration has not.", name)
        elif old.harmless is _ANYTHING or value == old.harmless:
            logger.info(f"{name}: has no effect any more, and none is needed")
        else:
            raise ConfigError(f"is {value!r}, and there is no such option any more: {old.advice}.", name)
    return found


class Configuration(type):
    """The type of configurations, which understands older names of their options.

    A dataclass has its own `__init__`, so that a name can be changed only before that is called.
    """

    def __call__(cls, *given: Any, **named: Any) -> Any:
        """Make one."""
        return super().__call__(*given, **translated(named, set(cls.__dataclass_fields__)))  # type: ignore[attr-defined]
