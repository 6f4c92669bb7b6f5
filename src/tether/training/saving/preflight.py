"""What saving needs, found out before weights are loaded or before the first step, and not when training is done."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler
from yaml import YAMLError

from tether.compat.trainer import steps_in_backward
from tether.errors import ConfigError, TetherError
from tether.files import is_full
from tether.models.adapters import rewrites_base
from tether.models.adapting.base_rewriting import is_rewritten
from tether.models.structure import trainable_tensors, unwrap
from tether.training.saving.model_settings import invalid_generation
from tether.training.saving.shared_folder import require_one_folder

logger = logging.getLogger("tether")
_CARD = "README.md"
_REHEARSAL = ".rehearsal-"
# A length for trying a schedule where only the rows tell the run's.
_STEPS = 1000
_IDLE = "Leave it out, or take an optimizer that does."
_BACKWARD = (
    "Such an optimizer steps inside the backward of each forward, and here a step is several forwards whose gradients "
    "add up (`max_tokens_per_forward`), is clipped, and is looked at before the update. Take an optimizer that steps "
    "after the backward, such as galore_adamw, apollo_adamw or adamw_torch."
)


def check_before_loading(args: TrainingArguments) -> None:
    """Refuse a place that nothing could be saved in, and an optimizer that cannot train so.

    Raises:
        ConfigError: the output folder cannot be written, or is not one for all nodes, or the hub cannot be pushed to;
            see also `check_optimizer`.
    """
    _check_values(args)
    check_optimizer(args)
    _refuse_idle(args)
    _check_trackers(args)
    _check_schedule(args)
    _check_loader(args)
    if args.should_save:
        _check_folder(Path(str(args.output_dir)))
    require_one_folder(args)
    if args.push_to_hub:
        _check_hub(args)


def check_optimizer(args: TrainingArguments, optimizer: Any = None) -> None:
    """Refuse an optimizer that updates before a step is whole.

    Args:
        args: of the run; `optim` names one.
        optimizer: that was passed in memory; None for none.

    Raises:
        ConfigError: with the reason.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if optimizer is None and (name.endswith("layerwise") or name in ("lomo", "adalomo")):
        raise ConfigError(f"is {name!r}. {_BACKWARD}", "optim")
    if steps_in_backward(optimizer):
        raise ConfigError(f"optimizers: a layer-wise optimizer was given, by hooks on the parameters. {_BACKWARD}")


def _check_values(args: TrainingArguments) -> None:
    """Refuse values that would end a run late, or have it save nothing."""
    best = args.save_strategy == "best" and args.metric_for_best_model is None
    wrong = {
        "output_dir": "Name a folder that results can go to" if not str(args.output_dir).strip() else "",
        "max_steps": "It must be a whole number" if not isinstance(args.max_steps, int) else "",
        "save_steps": "Nothing would be saved; save_strategy=no says that"
        if args.save_strategy == "steps" and not args.save_steps
        else "",
        "metric_for_best_model": "save_strategy is best: name a metric of the evaluation" if best else "",
        "adam_epsilon": "A weight without a gradient would become 0/0" if args.adam_epsilon == 0 else "",
    }
    name = next((name for name, advice in wrong.items() if advice), None)
    if name is not None:
        raise ConfigError(f"is {getattr(args, name)!r}. {wrong[name]}.", name)


def _check_trackers(args: TrainingArguments) -> None:
    """Refuse a tracker that transformers does not know; what is known and not installed says so itself."""
    try:
        get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise ConfigError(f"is {args.report_to!r}: {error} To have none, say `none` alone.", "report_to") from error


def _check_schedule(args: TrainingArguments) -> None:
    """Make the learning-rate schedule for an optimizer of one number: what it refuses is known before weights load."""
    steps = args.max_steps if args.max_steps > 0 else _STEPS

    def first_rate(warmup: int) -> float:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
        made = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, cast(Any, args.lr_scheduler_kwargs))
        return float(made.get_last_lr()[0])

    try:
        warmup, full = args.get_warmup_steps(steps), first_rate(0)
        idle = warmup > 0 and first_rate(warmup) == full != 0
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"is {args.lr_scheduler_kwargs!r} for {str(args.lr_scheduler_type)!r}: {' '.join(str(error).split())} "
            "Correct them, or take another schedule.",
            "lr_scheduler_kwargs",
        ) from error
    if idle:
        logger.warning(
            f"schedule: {args.lr_scheduler_type} has no warm-up, so that the {warmup} steps of one that were asked for "
            "are at the full learning rate; constant_with_warmup has one"
        )


def _check_loader(args: TrainingArguments) -> None:
    """Make a loader with the options of the run's, which would be refused after weights were loaded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again by the real one
            DataLoader(
                cast(Any, [0]),
                num_workers=args.dataloader_num_workers,
                persistent_workers=args.dataloader_persistent_workers,
                prefetch_factor=args.dataloader_prefetch_factor,
            )
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"is {args.dataloader_num_workers!r}: {' '.join(str(error).split())} Rows are prepared before, so that 0 "
            "workers and no further option lose nothing.",
            "dataloader_num_workers",
        ) from error


def _refuse_idle(args: TrainingArguments) -> None:
    """Refuse options of an optimizer that the one of the run does not read: with and without them it is the same.

    Raises:
        ConfigError: with the first of them.
    """
    whole = _optimizer(args)
    if whole is None:
        return
    name = str(getattr(args.optim, "value", args.optim))
    for field in ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules"):
        usual = type(args).__dataclass_fields__[field].default
        if getattr(args, field) != usual and _optimizer(args, field, usual) == whole:
            raise ConfigError(f"is {getattr(args, field)!r}, which the optimizer {name} does not read. {_IDLE}", field)
    given = str(args.optim_args or "").split(",") if args.optim_args else []
    for one in given:
        if _optimizer(args, "optim_args", ",".join(other for other in given if other != one)) == whole:
            raise ConfigError(f"has {one.strip()!r}, which the optimizer {name} does not read. {_IDLE}", "optim_args")


def _optimizer(args: TrainingArguments, field: str = "", value: Any = None) -> Any:
    """What the run's optimizer is made of, with one option changed; None where only the model tells."""
    changed = copy(args)
    if field:
        setattr(changed, field, value)
    try:
        return Trainer.get_optimizer_cls_and_kwargs(changed)
    except (ValueError, TypeError, ImportError, RuntimeError):
        return None


def rehearse(
    save: Callable[[str, Any], None],
    prove: Callable[[nn.Module, Path], None],
    policy: nn.Module,
    args: TrainingArguments,
) -> None:
    """Save once before the first step, in a folder that is removed again: all but the weights of a whole model.

    Of a policy with adapters these are written too, so that a trained tensor that no file would hold is known now.

    Args:
        save: what the trainer saves by, given a folder and the tensors (None: the model's own).
        prove: what compares the saved model with the one in memory; where the base under an adapter was rewritten, a
            second model is loaded for it now.
        policy: at the start.
        args: of the run.

    Raises:
        ConfigError: something cannot be saved.
    """
    problem = invalid_generation(policy)
    if problem:
        logger.warning(
            f"saving: transformers would not save this generation configuration ({problem}) It is saved as it is; set "
            "model.generation_config to what you mean"
        )
    if not args.should_save:
        return
    _check_card(Path(str(args.output_dir)) / _CARD, policy)
    _check_names(policy)
    with tempfile.TemporaryDirectory(prefix=_REHEARSAL, dir=str(args.output_dir)) as folder:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is to be said comes with the real save
                save(folder, None if isinstance(unwrap(policy), PeftModel) else {})
                if _rewrites(policy):
                    prove(policy, Path(folder))
        except ConfigError:
            raise
        except TetherError as error:
            raise ConfigError(
                f"What this run would save is not what it trains: {error} Where an adapter begins by writing into its "
                "base (PiSSA, OLoRA, LoftQ), give the base and peft_config in place of a PeftModel, or another `init`."
            ) from error
        except Exception as error:
            if is_full(error):  # neither the model's fault nor the run file's
                raise
            raise ConfigError(
                f"The run could not be saved when it is done: {type(error).__name__}: {' '.join(str(error).split())} "
                "Correct the model, its configuration or its tokenizer before training."
            ) from error


def _check_names(policy: nn.Module) -> None:
    """Refuse trained tensors of a whole model that no model made from its configuration has a place for."""
    inner = unwrap(policy)
    if isinstance(inner, PeftModel):
        return
    try:
        with torch.device("meta"):
            made = type(inner)(copy(inner.config))
    except Exception:  # the code of a model may want values, or arguments; loading the saved one tells then
        return
    known = {name for name, _ in made.named_parameters(remove_duplicate=False)}
    names = [name for name in trainable_tensors(inner) if name not in known]
    if names:
        raise ConfigError(
            f"The model has {len(names)} trained tensors, such as {names[0]!r}, that a {type(inner).__name__} made "
            "from its configuration does not have (weight_norm and other parametrisations, modules put in by hand), so "
            "that nothing could load what is saved. Take them out with "
            "torch.nn.utils.parametrize.remove_parametrizations, or train an adapter."
        )


def clear_rehearsals(folder: Path) -> None:
    """Remove what a run that was killed in its rehearsal left; called when the folder is this run's alone."""
    for left in folder.glob(f"{_REHEARSAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def _rewrites(policy: nn.Module) -> bool:
    inner = unwrap(policy)
    configs = inner.peft_config.values() if isinstance(inner, PeftModel) else ()
    return is_rewritten(policy) or any(map(rewrites_base, configs))


def _check_folder(folder: Path) -> None:
    places = [folder.absolute(), *folder.absolute().parents]
    missing = list(takewhile(lambda place: not place.exists(), places))
    there = places[len(missing)]
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not a folder" if not there.is_dir() else "cannot be written"
        raise ConfigError(f"is '{folder}', and '{there}' {why}. Name a folder that results can go to.", "output_dir")
    if not missing:
        return
    try:
        missing[-1].mkdir(exist_ok=True)
        with suppress(OSError):  # another process of the run may be at it, too
            missing[-1].rmdir()
    except OSError as error:
        why = f"it cannot be made: {error.strerror}"
        raise ConfigError(f"is '{folder}', and {why}. Name a folder that results can go to.", "output_dir") from error


def _check_hub(args: TrainingArguments) -> None:
    if HF_HUB_OFFLINE:
        raise ConfigError("is on, and HF_HUB_OFFLINE is set. Unset one of them.", "push_to_hub")
    try:
        if args.hub_model_id is not None:
            validate_repo_id(args.hub_model_id)
        token = args.hub_token or get_token()
        if token is None:
            raise ConfigError("is on, and nobody is logged in. Run `hf auth login`, or set hub_token.", "push_to_hub")
        HfApi().whoami(token)
    except HFValidationError as error:
        raise ConfigError(f"is {args.hub_model_id!r}: {error}", "hub_model_id") from error
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"is on, and the hub does not let this login in: {reason} Log in again, or leave it out.", "push_to_hub"
        ) from error


def _check_card(card: Path, policy: nn.Module) -> None:
    """PEFT goes on from the card that is in the folder."""
    if not card.is_file() or not isinstance(unwrap(policy), PeftModel):
        return
    try:
        ModelCard.load(card)
    except (ValueError, YAMLError) as error:
        raise ConfigError(
            f"'{card}' has a head that is not valid ({' '.join(str(error).split())}), and the model card is written "
            "over it. Correct or remove it."
        ) from error
