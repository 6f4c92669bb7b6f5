"""Torch still has the places that `tether.compat.torch` names, and they do what is relied on."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tether.compat import torch as places


def test_every_dropout_layer_derives_from__DropoutNd():
    layers = [nn.Dropout(), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()]
    assert all(isinstance(layer, places.DropoutLayer) for layer in layers)
    assert not isinstance(nn.Linear(1, 1), places.DropoutLayer)


def test_wrappers_put__checkpoint_wrapped_module_and__orig_mod_before_names():
    inner = nn.Sequential(nn.Linear(2, 2))
    names = [name for name, _ in checkpoint_wrapper(inner).named_modules() if name]
    assert names[0] == places.WRAPPER_NAMES[0].rstrip(".")
    compiled = torch.compile(inner, backend="eager")
    assert next(name for name, _ in compiled.named_parameters()).startswith(places.WRAPPER_NAMES[1])
    assert places.compiled_module(compiled) is inner
    assert places.compiled_module(inner) is None


@pytest.mark.skipif(not places.has_onednn(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("bias", [None, torch.arange(3.0)])
def test_mkldnn__linear_pointwise_is_a_linear_layer(bias):
    inputs, weight = torch.randn(5, 4), torch.randn(3, 4)
    torch.testing.assert_close(places.onednn_linear(inputs, weight, bias), nn.functional.linear(inputs, weight, bias))


def test_aten__softmax_backward_data_is_the_gradient():
    scores = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weights, grad = scores.softmax(-1), torch.randn(2, 3, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(weights, scores, grad)
    torch.testing.assert_close(places.softmax_backward(grad, weights.detach()), expected)


def test_modules_keep__forward_hooks():
    layer = nn.Linear(1, 1)
    assert not places.has_forward_hooks(layer)
    hook = layer.register_forward_hook(lambda *_: None)
    assert places.has_forward_hooks(layer)
    hook.remove()
    assert not places.has_forward_hooks(layer)


class TwoParts(torch.Tensor):
    """A tensor of its own class, made of values and a scale, as torch's compiler takes such apart."""

    @staticmethod
    def __new__(cls, values, scale):
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape)
        made.values, made.scale = values, scale
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError

    def __tensor_flatten__(self):
        return ["values", "scale"], None


def test_tensors_say___tensor_flatten__():
    values, scale = torch.ones(2), torch.tensor(3.0)
    found = places.inner_tensors(TwoParts(values, scale))
    assert [part is whole for part, whole in zip(found, (values, scale), strict=True)] == [True, True]
    assert places.inner_tensors(torch.ones(2)) == []


class _Runs:
    def __reduce__(self):
        return os.system, ("true",)


def test_the_metadata_of_shards_is_torchs_own(tmp_path, monkeypatch):
    """A pickle; torch's reader would run what it names (INV-39)."""
    values = {"weight": torch.ones(4, 2), "half": torch.ones(2, dtype=torch.bfloat16), "step": 3}
    with pytest.warns(UserWarning, match="single process"):
        checkpoint.save(values, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert places.foreign_metadata(tmp_path / "shards" / ".metadata") == ""
    ran, runs = [], pickle.dumps(_Runs())
    monkeypatch.setattr(os, "system", ran.append)
    for crafted in (
        runs,
        b"ctorch.distributed.checkpoint.metadata\nos.system\n(Vtrue\ntR.",
        b"\x80\x04\x8c%torch.distributed.checkpoint.metadata\x8c\tos.system\x93\x8c\x04true\x85R.",
    ):
        (tmp_path / ".metadata").write_bytes(crafted)
        assert "os" in places.foreign_metadata(tmp_path / ".metadata")
    (tmp_path / ".metadata").write_bytes(b"\x80\x04junk")
    assert places.foreign_metadata(tmp_path / ".metadata") != ""
    assert ran == []


def test_what_is_kept_inside_a_replay_has_values():
    with places.without_values():
        assert places.has_no_values(torch.zeros(2))
        with places.with_values():
            kept = torch.arange(3)
        assert places.has_no_values(torch.zeros(2))
    assert kept.tolist() == [0, 1, 2]
