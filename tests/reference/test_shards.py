"""Shards as DeepSpeed's stage 3 describes them on a parameter, in one process; `test_sharded.py` has real ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tether.compat.deepspeed import is_away, whole_size
from tether.errors import ReferencePolicyError
from tether.models.fingerprint import fingerprint
from tether.models.partitioned import whole_weights
from tether.reference.methods.shards import local_part, sums


class Shard(nn.Parameter):
    """A matrix `[2, 3]` whose numbers are in a shard with room for eight, as that of a run of one process would be."""

    def __new__(cls, values, place="AVAILABLE"):
        self = super().__new__(cls, torch.empty(0))
        self.ds_tensor = torch.cat([values.flatten(), torch.full((2,), float("nan"))])
        self.ds_tensor.ds_numel, self.ds_tensor.status = 8, SimpleNamespace(name=place)
        self.ds_numel, self.ds_shape, self.ds_process_group = 6, values.shape, None
        self.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
        return self

    def all_gather(self, param_list):
        """Make parameters whole."""
        for one in param_list:
            one.data, one.ds_status = one.ds_tensor[:6].view(one.ds_shape).clone(), SimpleNamespace(name="AVAILABLE")

    def partition(self, param_list, has_been_updated):
        """Cut parameters, with what was written into them."""
        for one in param_list:
            if has_been_updated:
                one.ds_tensor[:6] = one.data.flatten()
            one.data, one.ds_status = torch.empty(0), SimpleNamespace(name="NOT_AVAILABLE")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)


def matrix():
    return torch.arange(6.0).view(2, 3)


def test_what_this_process_holds_is_without_the_padding():
    shard = Shard(matrix())
    assert is_away(shard)
    assert whole_size(shard) == 6
    torch.testing.assert_close(local_part(shard), torch.arange(6.0))
    total, squares = sums({"w": shard})["w"].tolist()
    assert (total, squares) == (15.0, pytest.approx(55.0))


@pytest.mark.parametrize("twice", [False, True], ids=["on a disk", "twice"])
def test_shards_that_cannot_be_exchanged_are_refused_with_what_to_do(twice):
    shard = Shard(matrix(), place="AVAILABLE" if twice else "NOT_AVAILABLE")
    shard.ds_secondary_tensor = shard.ds_tensor if twice else None
    with pytest.raises(ReferencePolicyError, match="Leave that out of its configuration"):
        local_part(shard)


def test_a_model_in_shards_is_whole_inside_and_keeps_what_was_written():
    model = nn.Linear(3, 2, bias=False)
    model.weight = Shard(matrix())
    with pytest.raises(ReferencePolicyError, match="sharded over several processes"):
        fingerprint({"w": model.weight})
    with whole_weights(model):
        assert fingerprint({"w": model.weight}) == fingerprint({"w": matrix()})
        torch.testing.assert_close(local_part(model.weight), matrix())
        model.weight.data += 1
    assert is_away(model.weight)
    torch.testing.assert_close(local_part(model.weight), torch.arange(6.0) + 1)
