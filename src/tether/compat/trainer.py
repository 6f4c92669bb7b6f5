"""Places of `transformers.Trainer` that it does not document; read in transformers 5.23.0.

The hooks that Tether overrides are in `tests/compat/test_trainer_hooks.py`, with how the installed trainer calls them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Trainer


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
