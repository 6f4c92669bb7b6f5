"""The trainer still has the places that `tether.compat.trainer` names, and they do what is relied on."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from compat_calls import calls
from tether.compat import trainer as places
from tiny import QUIET, tiny_model


class Told(TrainerCallback):
    """Which events came."""

    def __init__(self):
        self.events = []

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")

    def on_prediction_step(self, args, state, control, **kwargs):
        self.events.append("prediction")


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def trainer(tmp_path, told):
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=3, **QUIET)
    return Trainer(tiny_model("llama"), args, callbacks=[told])


def test_evaluation_loop_calls__wrap_model(trainer):
    assert calls("evaluation_loop", "self._wrap_model") == ["self._wrap_model(self.model, training=False)"]
    assert places.wrapped_for_evaluation(trainer) is trainer.model


def test_train_sets__train_batch_size(trainer):
    assert places.train_batch_size(trainer) == 3
    trainer._train_batch_size = 5
    assert places.train_batch_size(trainer) == 5
    assert "batch_size=self._train_batch_size" in inspect.getsource(Trainer.get_train_dataloader)


def test__get_output_dir_is_where_checkpoints_are_written(trainer, tmp_path, told):
    trainer.state.global_step = 7
    trainer.create_optimizer_and_scheduler(1)
    assert places.checkpoint_folder(trainer) == tmp_path / "checkpoint-7"
    places.save_checkpoint(trainer)
    assert (tmp_path / "checkpoint-7" / "model.safetensors").is_file()
    assert told.events == ["save"]


def test_callback_handler_has_on_prediction_step(trainer, told):
    places.announce_prediction_step(trainer)
    assert told.events == ["prediction"]
    assert len(calls("evaluation_loop", "self.callback_handler.on_prediction_step")) == 1


def test_training_step_divides_a_loss_unless_model_accepts_loss_kwargs(trainer):
    class Counted(nn.Module):
        def forward(self, x):
            return x

    plain = Trainer(Counted(), trainer.args)
    assert plain.model_accepts_loss_kwargs is False
    places.expect_summed_loss(plain)
    assert plain.model_accepts_loss_kwargs is True
    assert "self.model_accepts_loss_kwargs and num_items_in_batch is not None" in inspect.getsource(
        Trainer.training_step
    )


def test_trainers_say_is_fsdp_enabled_and_is_deepspeed_enabled(trainer):
    assert places.keeps_shards(trainer) is False
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        assert getattr(trainer, name) is False
        setattr(trainer, name, True)
        assert places.keeps_shards(trainer) is True
        setattr(trainer, name, False)


def test_trainers_keep_their_deepspeed_engine(trainer):
    assert places.deepspeed_engine(trainer) is None
    assert "self.deepspeed = self.model_wrapped" in inspect.getsource(Trainer._prepare_for_training)


def test__get_grad_norm_comes_before_the_update_whatever_is_clipped_or_logged():
    source = inspect.getsource(Trainer._run_epoch)
    assert calls("_run_epoch", "self._get_grad_norm") == ["self._get_grad_norm(model, grad_norm=grad_norm)"]
    assert source.index("self._get_grad_norm(") < source.index("self.optimizer.step()")


def test_evaluation_loop_asks_an_optimizer_for_its_averages(trainer):
    class Modes(torch.optim.SGD):
        said = ()

        def train(self):
            self.said += ("train",)

        def eval(self):
            self.said += ("eval",)

    assert calls("evaluation_loop", "self.optimizer.eval") == ["self.optimizer.eval()"]
    plain, modes = (kind([torch.zeros(1, requires_grad=True)], lr=0.1) for kind in (torch.optim.SGD, Modes))
    for optimizer in (None, plain, modes):
        places.use_averages(optimizer)
        places.use_live_weights(optimizer)
    assert modes.said == ("eval", "train")


def test_a_stand_in_for_layer_wise_optimizers_is_known():
    assert places.steps_in_backward(LayerWiseDummyOptimizer(optimizer_dict={}))
    assert not places.steps_in_backward(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))


def test_what_may_add_metrics_is_known(trainer):
    class Adds(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_more"] = 1.0

    class Evaluates(Trainer):
        def evaluate(self, *args, **kwargs):
            return {}

    assert not places.reports_more(trainer, Trainer)
    assert places.reports_more(Evaluates(trainer.model, trainer.args), Trainer)
    trainer.add_callback(Adds())
    assert places.reports_more(trainer, Trainer)
