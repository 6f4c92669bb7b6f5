"""Accelerate still has the places that `tether.compat.accelerate` names, and they do what is relied on."""

from __future__ import annotations

import inspect

import pytest
import torch
from accelerate import Accelerator, data_loader
from accelerate.utils import fsdp_utils
from torch import nn
from torch.utils.data import DataLoader

from tether.compat import accelerate as places


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_gradient_state__set_sync_gradients_decides_what_sync_gradients_says(accelerator):
    assert accelerator.sync_gradients is True
    with places.step_incomplete(accelerator):
        assert accelerator.sync_gradients is False
    assert accelerator.sync_gradients is True


def test_dataloader_config_even_batches_is_read_when_a_loader_is_prepared(accelerator):
    assert accelerator.even_batches is True
    with places.uneven_batches(accelerator):
        assert accelerator.even_batches is False
    assert accelerator.even_batches is True
    assert "even_batches=self.even_batches" in inspect.getsource(Accelerator.prepare_data_loader)


def test_gradient_state_knows_end_of_dataloader_and_remainder(accelerator):
    found = []
    for _ in accelerator.prepare(DataLoader(range(5), batch_size=2)):
        found.append(places.rows_of_last_round(accelerator))
    assert found == [None, None, 1]
    assert places.rows_of_last_round(accelerator) is None
    assert "self.remainder" in inspect.getsource(data_loader.DataLoaderStateMixin)


def test_wrapped_optimizers_keep_theirs_as_optimizer(accelerator):
    plain = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    wrapped = accelerator.prepare(plain)
    assert wrapped is not plain
    assert places.plain_optimizer(wrapped) is plain
    assert places.plain_optimizer(plain) is plain


def test_fsdp2_is_known_by_is_fsdp2_and_prepared_by_fsdp2_prepare_model(accelerator):
    assert places.uses_fsdp2(accelerator) is False
    assert [*inspect.signature(fsdp_utils.fsdp2_prepare_model).parameters] == ["accelerator", "model"]


def test_the_state_has_a_deepspeed_plugin_or_none(accelerator):
    assert places.stage3_settings(accelerator) is None
    assert "self.deepspeed_plugin" in inspect.getsource(Accelerator) or hasattr(accelerator.state, "deepspeed_plugin")
