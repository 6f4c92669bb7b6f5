"""oneDNN's products equal torch's default: values, gradients of any order, any strides; and only where asked."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear

from tether.compute import cpu_matmul as products
from tether.compute.cpu_matmul import OneDnnLinear, compute_by_products, product, use_products
from tether.errors import ConfigError
from tiny import tiny_model


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(70, 48), (1, 70, 48), (2, 5, 7, 48), (1, 48)], ids=str)
def test_values_and_gradients(shape, has_bias, onednn):
    """Three products a call: forward, by the inputs, by the weight."""
    inputs = tensors(shape, (33, 48), *([(33,)] if has_bias else []))
    found, expected = product(*inputs), linear(*inputs)
    assert close(found, expected)
    grad = torch.randn(expected.shape)
    pairs = zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    assert all(close(*pair) for pair in pairs)
    assert len(onednn) == 3


@pytest.mark.parametrize("shape", [(70, 48), (1, 70, 48), (2, 5, 7, 48)], ids=str)
def test_an_output_may_be_changed_in_place(shape, onednn):
    """As OLMo and DBRX clip their projections: values and gradients are those of torch's own layer."""
    inputs = tensors(shape, (33, 48))
    found, expected = product(*inputs).clamp_(-1, 1), linear(*inputs).clamp(-1, 1)
    assert close(found, expected)
    grad = torch.randn(expected.shape)
    pairs = zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    assert all(close(*pair) for pair in pairs)
    assert onednn


def test_only_the_gradients_that_are_needed(onednn):
    """A frozen weight costs no product, and its inputs are not kept: what LoRA saves."""
    inputs, weight = tensors((70, 48), (33, 48))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        output = product(inputs, weight.detach())
    assert kept == [weight.shape]
    output.sum().backward()
    assert len(onednn) == 2


def test_gradients_of_gradients(onednn):
    """A penalty on the gradient is differentiable too."""
    inputs = tensors((20, 16), (12, 16))
    results = []
    for way in (product, linear):
        (grad,) = torch.autograd.grad(way(*inputs).square().sum(), inputs[:1], create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), inputs))
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-2) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t[:, :48],  # gaps between rows
        lambda t: t[::2, ::2],  # and between columns
        lambda t: t.t()[:96],  # transposed
        lambda t: t[:1].expand(33, 96),  # one row, often
        lambda t: t[:, :1].expand(96, 33),
        lambda t: t[5:, 7:],
    ],
)
def test_strides(make, onednn):
    """As inputs and as weight: slices, transposed and expanded tensors."""
    strided = make(torch.randn(96, 96))
    dense = torch.randn(40, strided.shape[1])
    assert close(product(dense, strided), linear(dense, strided))
    assert close(product(strided, dense), linear(strided, dense))
    assert len(onednn) == 2


def test_a_matrix_with_gaps_is_copied(onednn, monkeypatch):
    """oneDNN multiplies it by its reference kernel otherwise, which is hundreds of times slower."""
    seen = []
    operator = torch.ops.mkldnn._linear_pointwise

    class Spy:
        def _linear_pointwise(self, inputs, weight, *rest):
            seen.append(weight.is_contiguous() or weight.t().is_contiguous())
            return operator(inputs, weight, *rest)

    monkeypatch.setattr(torch.ops, "mkldnn", Spy())
    whole = torch.randn(96, 96)
    for weight in (whole, whole.t(), whole[:, :48], whole.t()[:, :48], whole[::2]):
        product(torch.randn(8, weight.shape[1]), weight)
    assert seen == [True] * 5


@pytest.mark.parametrize("width", [8, 96])
def test_the_derivative_by_a_narrow_weight_has_its_shorter_side_as_rows(width, onednn, monkeypatch):
    """The other way round oneDNN takes several times as long, for an adapter's matrices."""
    inputs, weight = tensors((50, width), (104 - width, width))
    inputs = inputs.detach()
    expected = torch.autograd.grad(linear(inputs, weight).square().sum(), weight)[0]
    seen = []
    plain = products.onednn_product
    monkeypatch.setattr(products, "onednn_product", lambda one, *rest: seen.append(one.shape[0]) or plain(one, *rest))
    (found,) = torch.autograd.grad(product(inputs, weight).square().sum(), weight)
    assert close(found, expected)
    assert seen == [50, 8]


def test_what_does_not_go_to_onednn(onednn, monkeypatch):
    """Other dtypes, autocast, tensors of a kind of their own, small products, and everything by default."""

    class Own(torch.Tensor):
        pass

    inputs, weight = (one.detach() for one in tensors((64, 64), (64, 64)))
    product(inputs.double(), weight.double())
    product(inputs.bfloat16(), weight.bfloat16())
    product(inputs.as_subclass(Own), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(inputs, weight).dtype == torch.bfloat16
    monkeypatch.setattr(products, "LEAST_WORK", 64**3 + 1)
    product(inputs, weight)
    assert not onednn
    monkeypatch.setattr(products, "LEAST_WORK", 64**3)
    product(inputs, weight)
    assert len(onednn) == 1
    use_products("default")
    product(inputs, weight)
    assert len(onednn) == 1


def test_the_layers_of_a_model(onednn):
    """Same numbers, same tensors under the same names; the head is left alone; a copy computes the same."""
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.arange(5, 25)[None]
    names, before = list(model.state_dict()), model(ids).logits
    compute_by_products(model)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {nn.Linear, OneDnnLinear}
    assert type(model.get_output_embeddings()) is nn.Linear
    assert list(model.state_dict()) == names
    assert close(model(ids).logits, before)
    assert onednn
    assert close(copy.deepcopy(model)(ids).logits, before)
    merged = model.merge_and_unload()
    assert close(merged(ids).logits, before)


def test_nothing_is_changed_by_default():
    model = tiny_model()
    compute_by_products(model)
    assert not any(isinstance(module, OneDnnLinear) for module in model.modules())


def test_a_build_without_it_says_so(monkeypatch):
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    with pytest.raises(ConfigError, match="was built without it"):
        use_products("onednn")
