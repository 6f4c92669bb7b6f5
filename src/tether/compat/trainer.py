"""Places of `transformers.Trainer` that it does not document; read in transformers 5.23.0.

The hooks that Tether overrides are in `tests/compat/test_trainer_hooks.py`, with how the installed trainer calls them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

# Callbacks of these packages read metrics and add none.
_OURS = ("transformers", "tether")


def wrapped_for_evaluation(trainer: Trainer) -> nn.Module:
    """The model as an evaluation calls it, wrapped as `evaluation_loop` wraps it, which Tether overrides."""
    return trainer._wrap_model(cast(nn.Module, trainer.model), training=False)


def train_batch_size(trainer: Trainer) -> int:
    """Rows of a batch of this process; it may differ from the arguments', as a resumed run takes the checkpoint's."""
    return cast(int, trainer._train_batch_size)


def checkpoint_folder(trainer: Trainer, trial: Any = None) -> Path:
    """Where the checkpoint of the present step is or would be written, also in a search over hyperparameters."""
    return Path(trainer._get_output_dir(trial)) / f"checkpoint-{trainer.state.global_step}"


def save_checkpoint(trainer: Trainer) -> None:
    """Write the checkpoint of the present step out of turn, and tell the callbacks, as the loop does in its turn."""
    trainer._save_checkpoint(cast(nn.Module, trainer.model), None)
    trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


@contextmanager
def checkpoints_below(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Inside, a checkpoint is written below another folder, and none is pushed; what is the best one stays so called.

    transformers removes old checkpoints at the end of its saving, from the folder that it saves in: none lie there.
    """
    loose: Any = trainer
    usual = Path(loose._get_output_dir(None))
    loose._get_output_dir, loose._push_from_checkpoint = lambda trial=None: str(folder), lambda place: None
    try:
        yield
        best = usual / f"checkpoint-{trainer.state.best_global_step}"
        now = folder / f"checkpoint-{trainer.state.global_step}"
        if trainer.state.best_global_step and (best.name == now.name or best.is_dir()):
            trainer.state.best_model_checkpoint = str(best)
            if trainer.args.should_save:
                trainer.state.save_to_json(str(now / "trainer_state.json"))
    finally:
        del loose._get_output_dir, loose._push_from_checkpoint


def push_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Push a checkpoint that is written, where that was asked for."""
    if trainer.args.push_to_hub:
        trainer._push_from_checkpoint(str(folder))


def loss_since_log(trainer: Trainer) -> tuple[int, float]:
    """The step of the last log, and the sum of this process' losses since."""
    return cast(int, trainer._globalstep_last_logged), float(trainer._tr_loss)


def continue_log(trainer: Trainer, last_logged: int, loss: float) -> None:
    """Have the next log be of all steps since an earlier one; a resumed loop begins to count where it resumes."""
    trainer._globalstep_last_logged = last_logged
    trainer._tr_loss.fill_(loss)


def announce_prediction_step(trainer: Trainer) -> None:
    """Tell the callbacks of a batch that was evaluated, as `evaluation_loop` does, which Tether overrides."""
    trainer.control = trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)


def expect_summed_loss(trainer: Trainer) -> None:
    """Have the trainer leave a loss as it is: a share of the whole step's mean, not to be divided by its batches."""
    trainer.model_accepts_loss_kwargs = True


def keeps_shards(trainer: Trainer) -> bool:
    """Whether checkpoints are read by FSDP or DeepSpeed, each in its own form."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def deepspeed_engine(trainer: Trainer) -> nn.Module | None:
    """DeepSpeed's engine around the model, once training has begun; None without it."""
    return cast("nn.Module | None", trainer.deepspeed)


def reports_more(trainer: Trainer, known: type[Trainer]) -> bool:
    """Whether an evaluation may give other metrics than the class `known` does: a subclass or a callback adds some.

    `on_evaluate` is handed the very dictionary that the best model is chosen by.
    """
    mine = type(trainer)
    hooks = ("evaluate", "evaluation_loop", "compute_loss")
    callbacks = (type(callback) for callback in trainer.callback_handler.callbacks)
    return any(getattr(mine, hook) is not getattr(known, hook) for hook in hooks) or any(
        kind.on_evaluate is not TrainerCallback.on_evaluate and kind.__module__.split(".")[0] not in _OURS
        for kind in callbacks
    )


def steps_in_backward(optimizer: object) -> bool:
    """Whether an optimizer is the stand-in for others that step inside the backward, by hooks on each parameter."""
    return isinstance(optimizer, LayerWiseDummyOptimizer)


def use_averages(optimizer: Any) -> None:
    """Have an optimizer with two modes (schedule-free) put its averaged weights into the model, as an evaluation does.

    Tether overrides `evaluation_loop`, where transformers does it; and transformers saves without doing it.
    """
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()


def use_live_weights(optimizer: Any) -> None:
    """The other mode, in which such an optimizer trains; nothing for one that has no modes."""
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
