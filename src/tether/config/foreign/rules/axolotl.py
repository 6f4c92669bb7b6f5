"""Axolotl's YAML: what its keys become, with its defaults. Rules of `convert`; data sets are in `axolotl_data`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from tether.config.foreign.draft import Draft, Source, as_number
from tether.config.foreign.rules import axolotl_data, axolotl_model, axolotl_online, shared
from tether.config.foreign.rules.axolotl_online import KINDS
from tether.objectives import OBJECTIVES

_PREFERENCE = ("dpo", "ipo", "kto", "orpo", "simpo")
_NOT_HERE = {"ebft": "energy-based fine-tuning"}
# Plugins that change what is computed in no way that matters here.
_HARMLESS_PLUGINS = ("liger", "cut_cross_entropy", "kernels", "lm_eval", "swanlab")
_OPTIONS = {
    "label_smoothing": "dpo_label_smoothing",
    "use_weighting": "dpo_use_weighting",
    "weights": "dpo_loss_weights",
    "simpo_gamma": "simpo_gamma",
    "cpo_alpha": "cpo_alpha",
    "desirable_weight": "kto_desirable_weight",
    "undesirable_weight": "kto_undesirable_weight",
    "center_rewards_coefficient": "center_rewards_coefficient",
}
_PEFT_OPTIONS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "init_lora_weights": "peft_init_lora_weights",
    "fan_in_fan_out": "lora_fan_in_fan_out",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "layers_to_transform": "peft_layers_to_transform",
    "layers_pattern": "peft_layers_pattern",
    "trainable_token_indices": "peft_trainable_token_indices",
    "ensure_weight_tying": "peft_ensure_weight_tying",
}
_SERVICES = {
    "wandb": ("use_wandb", "wandb_project"),
    "mlflow": ("use_mlflow",),
    "comet_ml": ("use_comet",),
    "trackio": ("use_trackio",),
    "tensorboard": ("use_tensorboard",),
    "swanlab": ("use_swanlab", "swanlab_project"),
}
_RUN_NAMES = ("wandb_name", "mlflow_run_name", "trackio_run_name", "swanlab_experiment_name")
_VARIABLES = {
    **{f"wandb_{name}": f"WANDB_{name.upper()}" for name in ("project", "entity", "mode", "run_id", "watch")},
    "wandb_log_model": "WANDB_LOG_MODEL",
    **{
        f"swanlab_{name}": f"SWANLAB_{name.upper()}"
        for name in ("project", "workspace", "mode", "web_host", "api_host")
    },
    "mlflow_tracking_uri": "MLFLOW_TRACKING_URI",
    "mlflow_experiment_name": "MLFLOW_EXPERIMENT_NAME",
    "hf_mlflow_log_artifacts": "HF_MLFLOW_LOG_ARTIFACTS",
    "comet_workspace": "COMET_WORKSPACE",
    "comet_project_name": "COMET_PROJECT_NAME",
    "comet_experiment_key": "COMET_EXPERIMENT_KEY",
    "comet_mode": "COMET_MODE",
    "comet_online": "COMET_ONLINE",
}


def _objective(draft: Draft, source: Source) -> None:
    kind = source.get("rl")
    if isinstance(kind, str) and kind in _NOT_HERE:
        source.refuse(
            "rl",
            f"`rl` is {kind!r}; {_NOT_HERE[kind]} is not here. Allowed are {', '.join((*_PREFERENCE, *KINDS))}.",
        )
    source.one_of("rl", (*_PREFERENCE, *KINDS))
    if kind in KINDS:
        axolotl_online.online(draft, source)
        return
    reward = source.flag("reward_model")
    if reward and kind:
        source.refuse("reward_model", f"`reward_model` and `rl: {kind}` are two trainings. Leave one of them out.")
    key, loss = "rl" if kind else "reward_model" if reward else "", kind or ("reward" if reward else "sft")
    losses = source.names("dpo_loss_type")
    if kind == "dpo":
        loss = "sigmoid" if losses is None else losses[0] if len(losses) == 1 else losses
        if loss in ("sft", "cpo", "simpo", "orpo"):  # names of other trainers in a run file
            loss = [loss]
        key = "dpo_loss_type" if losses else key
        for name in losses or ():
            if name not in OBJECTIVES["dpo"]:
                source.wrong("dpo_loss_type", name, ", ".join(OBJECTIVES["dpo"]))
    elif losses is not None:
        draft.note("dpo_loss_type", "it is of rl: dpo", "has no effect without rl: dpo")
    options = {name: (source.get(said), said) for name, said in _OPTIONS.items() if source.has(said)}
    if (share := source.number("rpo_alpha")) is not None:
        if loss != "sigmoid":
            source.refuse("rpo_alpha", "`rpo_alpha` adds a likelihood to one loss; name both in `dpo_loss_type`.")
        loss, key = ["sigmoid", "sft"], "rpo_alpha"
        options["weights"] = ([1.0, share], "rpo_alpha")
    if loss == "simpo":
        options.setdefault("cpo_alpha", (1.0, ""))  # TRL's default, which Axolotl leaves; SimPO's paper has 0
    if loss not in ("sft", "reward"):
        options["beta"] = _beta(source)
    shared.objective(draft, loss, key, options)
    if loss == "simpo" and not source.has("cpo_alpha"):
        draft.comments["objective.cpo_alpha"] = "Axolotl's default, which is TRL's; SimPO's paper has 0"
    _of_supervised(draft, source, loss)
    for said in ("dpo_beta", "rl_beta", "orpo_alpha"):
        if source.has(said) and not draft.fates[said].became and draft.fates[said].mark != "note":
            draft.note(said, "another key says it, or the loss has none", "is not read")
    if source.has("num_labels") and (not reward or source.number("num_labels") != 1):
        source.wrong("num_labels", source.get("num_labels"), "1, beside `reward_model: true`")


def _beta(source: Source) -> tuple[Any, str]:
    trl = source.mapping("trl")
    if trl.get("beta") is not None:
        if as_number(trl["beta"]) is None:
            source.wrong(("trl", "beta"), trl["beta"], "a number")
        return as_number(trl["beta"]), "trl"
    for key in ("rl_beta", "dpo_beta", "orpo_alpha"):
        if source.has(key):
            return source.number(key), key
    return 0.1, ""


def _of_supervised(draft: Draft, source: Source, loss: Any) -> None:
    if loss != "sft":
        draft.note("train_on_inputs", "prompts are never trained on by this loss", "has no effect under rl")
        return
    if source.flag("train_on_inputs"):
        draft.set("objective.completion_only_loss", False, "train_on_inputs")
    else:
        draft.set("train.turns", "assistant", comment="Axolotl trains on the assistant's turns")


def _reference(draft: Draft, source: Source) -> None:
    if source.flag("precompute_ref_log_probs"):
        draft.set("train.precompute_ref_log_probs", True, "precompute_ref_log_probs")
    if source.flag("rl_adapter_ref_model"):
        draft.set("reference.model", source.text("base_model"), "rl_adapter_ref_model")
        draft.explain("rl_adapter_ref_model", "", "is documented by Axolotl, and dropped by its own check")
    moving = source.mapping("trl")
    if moving.get("sync_ref_model"):
        draft.set("reference.sync.alpha", moving.get("ref_model_mixup_alpha") or 0.9, "trl")
        draft.set("reference.sync.steps", moving.get("ref_model_sync_steps") or 64, "trl")
    left = [
        key
        for key, value in moving.items()
        if value is not None and key not in ("beta", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
    ]
    if left and source.get("rl") not in KINDS:
        draft.explain("trl", f"{', '.join(map(str, left))}: of GRPO, not read here", "are read under rl: grpo alone")


def _adapter(draft: Draft, source: Source) -> None:
    kind = source.one_of("adapter", ("lora", "qlora"))
    given = {peft: (source.get(key), key) for peft, key in _PEFT_OPTIONS.items() if source.has(key)}
    folder = source.text("lora_model_dir")
    if kind is None or folder is not None:
        why = "the adapter of lora_model_dir is continued as it is" if folder else "no adapter is asked for"
        for key in ("lora_target_modules", "lora_target_linear", *(said for _, said in given.values())):
            draft.note(key, why)
    if folder is not None:
        draft.set("model.adapter", folder, "lora_model_dir")
        draft.set("reference.meaning", "start", "lora_model_dir")
        ignored = source.get("rl") in ("dpo", "ipo", "kto")
        draft.explain("lora_model_dir", "continued; the reference is the model as it starts, this adapter included")
        if ignored:
            draft.explain(
                "lora_model_dir", "", f"never loads it under rl: {source.get('rl')}, and starts from the base"
            )
    if kind is None or folder is not None:
        if kind is not None:
            draft.note("adapter", "the adapter of lora_model_dir is continued")
        return
    if "r" not in given:
        source.refuse("adapter", f"`adapter` is {kind!r} and `lora_r` is missing. Give the rank.")
    targets = source.get("lora_target_modules")
    if source.flag("lora_target_linear") or targets in ("all-linear", ["all-linear"]):
        given["target_modules"] = ("all-linear", "lora_target_linear" if source.has("lora_target_linear") else "")
        draft.explain("lora_target_modules", "all linear layers, as lora_target_linear says")
    elif targets is not None:
        given["target_modules"] = (targets, "lora_target_modules")
    draft.fates["adapter"].became.append("lora")
    shared.adapter(draft, given)


def _steps(draft: Draft, source: Source) -> None:
    if not source.has("learning_rate"):
        source.refuse("learning_rate", "`learning_rate` is missing, and Axolotl has no default for it. Give it.")
    micro, accumulated, total = (
        source.number(key) for key in ("micro_batch_size", "gradient_accumulation_steps", "batch_size")
    )
    for key in ("micro_batch_size", "gradient_accumulation_steps", "batch_size"):
        if source.has(key) and (not isinstance(source.number(key), int) or source.number(key) < 1):
            source.wrong(key, source.get(key), "a whole number from 1")
    micro = micro or 1
    if total and not accumulated:
        if total % micro:
            source.refuse("batch_size", f"`batch_size` is {total}, and `micro_batch_size` {micro} does not divide it.")
        draft.set("train.gradient_accumulation_steps", total // micro, "batch_size")
    else:
        draft.note("batch_size", "gradient_accumulation_steps says it")
        said = "gradient_accumulation_steps" if accumulated else ""
        draft.set("train.gradient_accumulation_steps", accumulated or 1, said, "" if said else "Axolotl's default")
    said = "micro_batch_size" if source.has("micro_batch_size") else ""
    draft.set("train.per_device_train_batch_size", micro, said, "" if said else "Axolotl's default")
    checkpointing = source.get("gradient_checkpointing", False)
    if checkpointing in ("offload", "offload_disk", "offload_legacy"):
        checkpointing = True
        draft.explain("gradient_checkpointing", "activations are computed anew, and those that are kept stay in place")
    if not isinstance(checkpointing, bool):
        source.wrong("gradient_checkpointing", checkpointing, "true, false or offload")
    said = "gradient_checkpointing" if source.has("gradient_checkpointing") else ""
    draft.set("train.gradient_checkpointing", checkpointing, said, "" if said else "Axolotl's default")
    strategy = source.one_of("excess_length_strategy", ("drop", "truncate", "raise"), "drop")
    said = "excess_length_strategy" if source.has("excess_length_strategy") else ""
    text = "" if said else "Axolotl's default: rows that are too long are left out"
    draft.set(
        "train.truncation_mode", {"drop": "drop", "truncate": "keep_start", "raise": "error"}[strategy], said, text
    )
    arguments = source.get("optim_args")
    if isinstance(arguments, dict):
        arguments = ",".join(f"{name}={value}" for name, value in arguments.items())
    if arguments is not None:
        draft.set("train.optim_args", arguments, "optim_args")
    _schedule(draft, source)
    for key in ("resume_from_checkpoint", "auto_resume_from_checkpoints"):
        if source.has(key) and source.get(key) is not False:
            value = source.get(key)
            once = "auto" if key.startswith("auto") else "last"
            draft.resume = once if value is True else str(value)
            draft.fates[key].became.append("--resume")


def _schedule(draft: Draft, source: Source) -> None:
    given = shared.warmup(draft, source)
    warmup, steps = draft.get("train.warmup_steps", 0), source.number("max_steps") or -1
    comment = "" if given else "Axolotl's default: 3 % of the steps, there at most 100"
    if not given or not warmup:
        warmup = min(int(0.03 * steps), 100) if steps > 0 else 0.03
    elif 0 < warmup < 1 and steps > 0:
        warmup = int(warmup * steps)
    # Axolotl makes two of one step.
    draft.values["train"]["warmup_steps"] = 2 if warmup == 1 else warmup
    if not given:
        draft.set("train.warmup_steps", draft.values["train"]["warmup_steps"], comment=comment)
    optimizer = source.one_of("optimizer", [one.value for one in OptimizerNames], "adamw_torch_fused")
    said = "optimizer" if source.has("optimizer") else ""
    draft.set("train.optim", optimizer, said, "" if said else "Axolotl's default")
    schedule = source.one_of("lr_scheduler", [one.value for one in SchedulerType], "cosine")
    said = "lr_scheduler" if source.has("lr_scheduler") else ""
    floor = source.number("cosine_min_lr_ratio")
    keywords = source.mapping("lr_scheduler_kwargs")
    if floor is not None:
        if schedule != "cosine":
            source.refuse(
                "cosine_min_lr_ratio", f"`cosine_min_lr_ratio` is of the cosine, and the schedule is {schedule}."
            )
        schedule, said = "cosine_with_min_lr", "cosine_min_lr_ratio"
        keywords = {**keywords, "min_lr_rate": floor}
    draft.set("train.lr_scheduler_type", schedule, said, "" if said else "Axolotl's default")
    if keywords:
        draft.set("train.lr_scheduler_kwargs", keywords, "lr_scheduler_kwargs" if floor is None else said)


def _callbacks(draft: Draft, source: Source) -> None:
    """What ends a run early."""
    if (threshold := source.number("loss_watchdog_threshold")) is not None:
        draft.set("callbacks.loss_watchdog.threshold", threshold, "loss_watchdog_threshold")
        said = "loss_watchdog_patience" if source.has("loss_watchdog_patience") else ""
        draft.set("callbacks.loss_watchdog.patience", source.number("loss_watchdog_patience") or 3, said)
    else:
        draft.note("loss_watchdog_patience", "of loss_watchdog_threshold, which is not given")
    if (patience := source.number("early_stopping_patience")) is not None:
        if draft.get("data.eval") is None:
            draft.note("early_stopping_patience", "there is nothing to evaluate")
        else:
            draft.set("callbacks.early_stopping.patience", patience, "early_stopping_patience")


def _evaluation(draft: Draft, source: Source) -> None:
    _callbacks(draft, source)
    keys = [key for key in ("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy") if source.has(key)]
    if draft.get("data.eval") is None:
        for key in (*keys, "eval_batch_size"):
            draft.note(key, "there is nothing to evaluate: val_set_size is 0, and there are no test_datasets")
        for name in ("metric_for_best_model", "greater_is_better", "load_best_model_at_end"):
            if source.has(name) and draft.get(f"train.{name}") is not None:
                del draft.values["train"][name]
                draft.note(name, "there is nothing to evaluate")
        return
    steps, key = _per_epoch(draft, source, "eval_steps", "evals_per_epoch")
    if steps:
        draft.set("train.eval_strategy", "steps", key)
        draft.set("train.eval_steps", steps, key)
        draft.set("train.eval_on_start", True, key, "as Axolotl does")
    else:
        said = next((name for name in ("eval_strategy", "evaluation_strategy") if source.has(name)), "")
        if said:
            draft.set("train.eval_strategy", source.get(said) or "no", said)
            if source.get(said) not in (False, "no"):
                draft.set("train.eval_on_start", True, said, "as Axolotl does")


def _saving(draft: Draft, source: Source) -> None:
    draft.set("train.logging_first_step", True, comment="as Axolotl does")
    steps, key = _per_epoch(draft, source, "save_steps", "saves_per_epoch")
    if steps:
        draft.set("train.save_strategy", "steps", key)
        draft.set("train.save_steps", steps, key)
        draft.note("save_strategy", f"{key} says it")
        return
    strategy = source.get("save_strategy", "epoch") or "no"
    said = "save_strategy" if source.has("save_strategy") else ""
    draft.set("train.save_strategy", strategy, said, "" if said else "Axolotl's default")


def _per_epoch(draft: Draft, source: Source, steps: str, times: str) -> tuple[Any, str]:
    """Steps between two, or the share of the run that `times` per epoch makes."""
    count, given = source.number(times), source.number(steps)
    if count is not None and count < 0:
        source.wrong(times, count, "a number from 0")
    if count and given:
        source.refuse(times, f"`{times}` and `{steps}` say the same thing. Leave one of them out.")
    if not count:
        return given, steps
    share = 1.0 / (count * (source.number("num_epochs") or 1.0))
    if share >= 1:  # as many steps as the run has: Axolotl sets none
        draft.note(times, "once a run is at its end", "sets nothing where it would be once a run")
        return None, times
    draft.explain(times, "as a share of the run")
    return share, times


def _tracking(draft: Draft, source: Source) -> None:
    if source.has("hub_model_id"):
        draft.set("train.push_to_hub", True, "hub_model_id")
        draft.set("train.hub_model_id", source.text("hub_model_id"), "hub_model_id")
        draft.set("train.hub_private_repo", True, "hub_model_id", "as Axolotl does")
        draft.set("train.hub_always_push", True, "hub_model_id")
    wanted = []
    for keys in _SERVICES.values():
        source.flag(keys[0])
    for service, keys in _SERVICES.items():
        said = next((key for key in keys if source.get(key) not in (None, False, "")), None)
        if said and source.get(keys[0]) is not False:
            wanted.append((service, said))
    on = {service for service, _ in wanted}
    names = [(source.get(key), key) for key in _RUN_NAMES if source.has(key)]
    shared.trackers(draft, wanted, next((one for one in names if one[1].split("_")[0] in on), None))
    for key, variable in _VARIABLES.items():
        if source.get(key) not in (None, "", False):
            shared.environment(draft, variable, source.get(key), key)
    if "trackio" in on:
        for key, target in (("trackio_project_name", "project"), ("trackio_space_id", "trackio_space_id")):
            if source.has(key):
                draft.set(f"train.{target}", source.text(key), key)
    for key in (*_RUN_NAMES, "trackio_project_name", "trackio_space_id"):
        if key in draft.fates and not draft.fates[key].became and draft.fates[key].mark != "note":
            draft.note(key, "its service is not asked for, or another one names the run")


def _sharding(draft: Draft, source: Source) -> None:
    keys = ["fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type"]
    extra = {"version": source.get("fsdp_version"), "state_dict_type": source.get("fsdp_final_state_dict_type")}
    shared.fsdp(draft, source, keys, extra)


def _plugins(draft: Draft, source: Source) -> None:
    for name in source.names("plugins") or ():
        if not name.startswith("axolotl.integrations.") or not any(part in name for part in _HARMLESS_PLUGINS):
            source.refuse("plugins", f"`plugins` has {name!r}, which is code that is not run here. Take it out.")
    draft.note("plugins", "what they save is not computed here in the first place")


RULES: dict[str, Callable[[Draft, Source], None]] = {
    "objective": _objective,
    "model": axolotl_model.model,
    "precision": axolotl_model.precision,
    "adapter": _adapter,
    "reference": _reference,
    "data": axolotl_data.data,
    "steps": _steps,
    "evaluation": _evaluation,
    "saving": _saving,
    "tracking": _tracking,
    "sharding": _sharding,
    "plugins": _plugins,
}
