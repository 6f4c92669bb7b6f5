"""What scripts override in a trainer, or hand to it, that Tether never calls: refused by name, with what to do."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, cast

from transformers import Trainer, TrainerCallback

from tether.errors import ConfigError

logger = logging.getLogger("tether")
_LOSS = (
    "Change the loss in `compute_loss`, which trains and evaluates, or in an algorithm class of your own (`loss`); "
    "docs/extending.md shows both"
)
_SCORES = "Policy and reference are scored by one function; change what is made of the scores, in an algorithm's `loss`"
_ROWS = (
    "Rows are prepared before the trainer exists: change them before they are passed as `train_dataset`, or in an "
    "algorithm's `rows`"
)
_REFERENCE = (
    "Say what the reference is (`reference`, `reference_adapter`, `ref_model`); `compute_ref_log_probs` and "
    "`precompute_reference` give its log-probs"
)
_METRICS = "Pass `compute_metrics`, or return further metrics in the `LossOutput` of an algorithm's `loss`"
_GENERATION = "Generate in a callback (`tether.trl.LogCompletionsCallback` does), or with `tether.evaluate`"
_ROLLOUT = "Sample in a `rollout_func`, or give an `engine` of your own; docs/rollouts.md has both"
_REWARDS = "Pass `reward_funcs`, which may name `log_metric` and `log_extra`; docs/rewards.md shows what they are given"
_LABELS = "There are no labels and no padding; see `tether.types.ScoringBatch` for what a batch holds"

# Methods that TRL's trainers of pairs, labels, texts, rewards and sampled completions call, in 1.16 and in earlier
# versions, and that transformers calls where `evaluation_loop` and `training_step` are its own. A subclass that has one
# of them expects to be called.
NEVER_CALLED: dict[str, str] = {
    **dict.fromkeys(
        (
            "_compute_loss",
            "_compute_loss_liger",
            "bco_loss",
            "compute_loss_func",
            "cpo_loss",
            "dpo_loss",
            "get_batch_loss_metrics",
            "kto_loss",
            "odds_ratio_loss",
            "orpo_loss",
            "simpo_loss",
            "get_batch_metrics",
            "_compute_reward",
            "get_gamma_weights",
            "get_high_entropy_mask",
            "get_off_policy_mask",
        ),
        _LOSS,
    ),
    **dict.fromkeys(
        (
            "_compute_kl_logps",
            "_compute_logps",
            "_get_batch_logps",
            "_concatenated_forward",
            "_forward",
            "_get_per_token_logps_and_entropies",
            "concatenated_forward",
            "concatenated_inputs",
            "compute_logps",
            "forward",
            "get_batch_logps",
            "get_sequence_length",
        ),
        _SCORES,
    ),
    **dict.fromkeys(
        (
            "_prepare_dataset",
            "_prepare_non_packed_dataloader",
            "_prepare_packed_dataloader",
            "_tokenize",
            "_tokenize_prompts",
            "build_tokenized_answer",
            "process_row",
            "tokenize_row",
            "_process_tokens",
            "_remove_unused_columns",
            "_set_signature_columns_if_needed",
            "_get_collator_with_removed_columns",
        ),
        _ROWS,
    ),
    **dict.fromkeys(
        (
            "_precompute_ref_logps",
            "compute_ref_log_probs",
            "compute_reference_log_probs",
            "get_reference_log_probs",
            "null_ref_context",
        ),
        _REFERENCE,
    ),
    **dict.fromkeys(
        (
            "_generate",
            "_generate_and_score_completions",
            "_generate_single_turn",
            "_get_tool_suffix_ids",
            "_tool_call_loop",
        ),
        _ROLLOUT,
    ),
    **dict.fromkeys(("_calculate_rewards", "_log_completion_extra", "_log_metric"), _REWARDS),
    **dict.fromkeys(("store_metrics", "prediction_step", "preprocess_logits_for_metrics"), _METRICS),
    **dict.fromkeys(
        ("generate_from_model", "generate_from_model_and_ref", "get_batch_samples_and_generate"), _GENERATION
    ),
    **dict.fromkeys(("_shift_right", "_pad_across_processes", "_nested_gather"), _LABELS),
}

# Arguments of TRL's and transformers' trainers, in 1.16 and before, that have no place here.
_CONFIGURATION = "it is a field of the configuration: {config}({name}=…)"
REFUSED_ARGUMENTS: dict[str, str] = {
    "compute_loss_func": f"it is called with logits and labels, which are never built. {_LOSS}",
    "preprocess_logits_for_metrics": f"logits are never built. {_METRICS}",
    "model_init": "it is for `hyperparameter_search`. Make a trainer for each trial, or search over run files",
    "formatting_func": "only SFTTrainer takes it. Map the rows before they are passed",
    "is_encoder_decoder": "that is read from the model's configuration. Leave it out",
    "generate_during_eval": _GENERATION,
    "label_pad_token_id": f"{_LABELS}. Leave it out",
    "padding_value": f"{_LABELS}. Leave it out",
    "packing": "rows are always packed without waste. Leave it out",
    "max_prompt_length": "`max_length` is of prompt and completion together, and `truncation_mode` says what is kept",
    "max_target_length": "`max_length` is of prompt and completion together, and `truncation_mode` says what is kept",
    "model_adapter_name": "the active adapter of the model trains. Activate it with model.set_adapter(name)",
    "ref_adapter_name": "it is `reference_adapter` of the configuration",
    "force_use_ref_model": "a `ref_model` beside an adapter is the reference without more. Leave it out",
    "rpo_alpha": "take loss_type=['sigmoid', 'sft'] and loss_weights=[1.0, rpo_alpha] in the configuration",
    "max_seq_length": "it is `max_length` of the configuration",
    "dataset_text_field": "rename the column to `text` before rows are passed",
    "num_of_sequences": "rows are packed by their tokens. Leave it out",
    "chars_per_token": "rows are packed by their tokens. Leave it out",
}
_OF_CONFIGURATION = (
    "beta",
    "dataset_num_proc",
    "desirable_weight",
    "disable_dropout",
    "f_divergence_type",
    "label_smoothing",
    "loss_type",
    "max_length",
    "model_init_kwargs",
    "neftune_noise_alpha",
    "precompute_ref_log_probs",
    "ref_model_init_kwargs",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "reference_free",
    "sync_ref_model",
    "truncation_mode",
    "undesirable_weight",
)
# What these are in transformers' constructor, which takes them as they are.
_PASSED_ON = ("optimizer_cls_and_kwargs",)


def refuse_overrides(trainer: object) -> None:
    """Refuse a method that its author expects to be called and that never is: of a subclass, or put on a trainer or a
    class of this package from outside. A trainer's class may know further ones (`never_called`).

    Raises:
        ConfigError: with the method and the way to do it here.
    """
    never = {**NEVER_CALLED, **getattr(type(trainer), "never_called", {})}
    for owner in (trainer, *type(trainer).__mro__):
        if owner is Trainer:
            return
        for name, value in vars(owner).items():
            # What Tether itself has under such a name is there for a script to call.
            own = (getattr(value, "__module__", None) or "").startswith("tether.")
            if name in never and value is not None and not own:
                kind = owner if isinstance(owner, type) else type(owner)
                raise ConfigError(
                    f"{kind.__name__}.{name} would never be called, since Tether has no such step. {never[name]}."
                )


def accepted_arguments(others: dict[str, Any], trainer: object, processing: Any) -> tuple[dict[str, Any], Any]:
    """What transformers' constructor is given of arguments that Tether's does not name, and the tokenizer.

    Args:
        others: arguments by name.
        trainer: whose they are.
        processing: `processing_class`, for which `tokenizer` is the older name.

    Raises:
        ConfigError: an argument without meaning here, with what to write.
    """
    config = cast(Any, trainer).algorithm_class.config
    others = {name: value for name, value in others.items() if value is not None or name not in REFUSED_ARGUMENTS}
    if "tokenizer" in others:
        tokenizer = others.pop("tokenizer")
        if processing is not None and processing is not tokenizer:
            raise ConfigError(
                "tokenizer and processing_class were both given; they are the same argument. Leave tokenizer out."
            )
        logger.info("tokenizer: taken as processing_class, as the argument is called now")
        processing = tokenizer
    for name in others:
        if name in REFUSED_ARGUMENTS:
            raise ConfigError(f"The trainer takes no argument {name}: {REFUSED_ARGUMENTS[name]}.")
        if name in _OF_CONFIGURATION or name in getattr(config, "__dataclass_fields__", {}):
            reason = _CONFIGURATION.format(config=config.__name__, name=name)
            raise ConfigError(f"The trainer takes no argument {name}: {reason}.")
        if name not in _PASSED_ON:
            named = inspect.signature(type(trainer)).parameters.values()
            known = [one.name for one in named if one.kind is one.POSITIONAL_OR_KEYWORD] + list(_PASSED_ON)
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"The trainer takes no argument {name}.{hint} It takes {', '.join(known)}.")
    return {name: value for name, value in others.items() if value is not None}, processing


# Callbacks of TRL that read what a trainer here has not, by the name of their class; each was tried.
_CALLBACKS: dict[str, str] = {
    "LogCompletionsCallback": "it reads texts from the prepared evaluation set. Use tether.trl.LogCompletionsCallback",
    "WeaveCallback": "it reads texts from the prepared evaluation set. Use tether.trl.LogCompletionsCallback",
    "SyncRefModelCallback": "it moves a second model. Set sync_ref_model=True in the configuration",
    "BEMACallback": "it keeps weights that neither a checkpoint here nor `save_model` would hold. Leave it out",
}


def refuse_callback(callback: TrainerCallback | type[TrainerCallback]) -> None:
    """Refuse a callback of TRL that cannot work here.

    Raises:
        ConfigError: with what takes its place.
    """
    kind = callback if isinstance(callback, type) else type(callback)
    for one in kind.__mro__:
        if one.__module__.partition(".")[0] == "trl" and one.__name__ in _CALLBACKS:
            raise ConfigError(f"TRL's {one.__name__} cannot work here: {_CALLBACKS[one.__name__]}.")


def overrides(trainer: object, method: Callable[..., Any]) -> bool:
    """Whether a trainer has its own version of a method of Tether's: of its class, or put on it alone."""
    return getattr(getattr(trainer, method.__name__), "__func__", None) is not method
