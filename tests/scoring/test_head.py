"""The fused head equals an ordinary log-softmax, in values and gradients (INV-19, 20, 22)."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tether.models.structure import transformers_model
from tether.scoring import pack, score, score_alone
from tether.scoring.head import Head, token_scores
from tether.scoring.score import head_of
from tiny import ragged_examples, tiny_model

N, HIDDEN, VOCABULARY = 11, 6, 13


def plain(head, hidden, targets):
    logits = head.module(hidden) * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits / head.temperature
    return logits, logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


class Doubled(nn.Module):
    """A head that is not a plain linear layer, as one with an adapter."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, hidden):
        return 2 * self.linear(hidden)


def make(bias, dtype=torch.float64, wrap=False):
    torch.manual_seed(0)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype)
    return Doubled(linear) if wrap else linear


HEADS = {
    "linear": Head(make(False)),
    "bias": Head(make(True)),
    "scaled": Head(make(True), scale=0.25),
    "softcapped": Head(make(False), scale=3.0, softcap=1.5),
    "wrapped": Head(make(True, wrap=True), softcap=4.0),
    "tempered": Head(make(True), scale=3.0, softcap=1.5, temperature=0.7),
    "wrapped, tempered": Head(make(True, wrap=True), temperature=1.3),
}


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", HEADS)
def test_values_and_gradients_equal_the_plain_form(name, trainable, chunk):
    head = HEADS[name]
    head.module.requires_grad_(trainable)
    hidden = torch.randn(N, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets, weights = torch.arange(N) % VOCABULARY, torch.linspace(-1, 2, N, dtype=torch.float64)
    results = []
    for function in (
        lambda h: token_scores(head, h, targets, chunk=chunk).token_logps,
        lambda h: plain(head, h, targets)[1],
    ):
        leaf = hidden.clone().requires_grad_()
        head.module.zero_grad()
        logps = function(leaf)
        (logps * weights).sum().backward()
        grads = [p.grad.clone() for p in head.module.parameters()] if trainable else []
        results.append([logps.detach(), leaf.grad, *grads])
    for fused, expected in zip(*results, strict=True):
        torch.testing.assert_close(fused, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", HEADS)
def test_further_outputs_equal_their_definitions(name):
    head = HEADS[name]
    hidden = torch.randn(N, HIDDEN, dtype=torch.float64)
    targets = torch.arange(N) % VOCABULARY
    logits, _ = plain(head, hidden, targets)
    found = token_scores(head, hidden, targets, outputs=("entropy", "top1", "mean_logits", "log_collision"), chunk=3)
    probs = logits.softmax(-1)
    torch.testing.assert_close(found.entropy, -(probs * probs.log()).sum(-1))
    torch.testing.assert_close(found.mean_logits, logits.mean(-1))
    torch.testing.assert_close(found.log_collision, probs.square().sum(-1).log())
    assert torch.equal(found.top1, logits.argmax(-1) == targets)


@pytest.mark.parametrize("name", HEADS)
def test_gradcheck(name):
    head, targets = HEADS[name], torch.arange(4)
    head.module.requires_grad_(True)
    hidden = torch.randn(4, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: token_scores(head, h, targets, chunk=3).token_logps, hidden)


def test_half_precision_is_float32_from_the_logits_on():
    """INV-22: the products are rounded to bfloat16, nothing after them."""
    head = Head(make(False, torch.bfloat16))
    hidden, targets = torch.randn(N, HIDDEN, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.long)
    found = token_scores(head, hidden, targets).token_logps
    assert found.dtype == torch.float32
    expected = head.module(hidden).float().log_softmax(-1)[:, 0]
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)


def test_extreme_logits_stay_finite():
    head = Head(nn.Linear(HIDDEN, VOCABULARY, bias=False))
    with torch.no_grad():
        head.module.weight.mul_(1e4)
    hidden = torch.randn(N, HIDDEN, requires_grad=True)
    found = token_scores(head, hidden, torch.arange(N) % VOCABULARY, outputs=("entropy",))
    found.token_logps.sum().backward()
    assert found.token_logps.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert (found.entropy >= -1e-4).all()
    assert (found.entropy <= math.log(VOCABULARY)).all()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_the_whole_logit_matrix_never_exists(trainable):
    """INV-20: the largest tensor has chunk x vocabulary numbers; with a plain head it has N x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return result

    rows, vocabulary, chunk = 300, 500, 20
    head = Head(nn.Linear(HIDDEN, vocabulary, bias=False).requires_grad_(trainable))
    hidden, targets = torch.randn(rows, HIDDEN, requires_grad=True), torch.zeros(rows, dtype=torch.long)
    with Largest() as fused:
        token_scores(
            head, hidden, targets, chunk=chunk, outputs=("entropy", "top1", "mean_logits")
        ).token_logps.sum().backward()
    with Largest() as whole:
        plain(head, hidden, targets)[1].sum().backward()
    assert fused.size <= chunk * vocabulary
    assert whole.size == rows * vocabulary


def adapted(**changes):
    """An adapter whose second matrix is not zero, so that it has a gradient and an effect."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", **changes})
    model = get_peft_model(tiny_model(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


MODELS = {
    "untied": tiny_model,
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "biased": lambda: tiny_model("phi"),
    "scaled": lambda: tiny_model("cohere2"),
    "divided": lambda: tiny_model("granite"),
    "soft-capped and tied": lambda: tiny_model("gemma2"),
    "LoRA on the head": adapted,
    "a whole head in the adapter": lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.sweep(10)
@pytest.mark.parametrize("library", ["default", "onednn"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_heads_of_models_equal_plain_log_softmax(name, frozen, library, request):
    """INV-19: the fused head inside a model against the model's own logits, values and every gradient."""
    if library == "onednn":
        request.getfixturevalue("onednn")
    model, batch = MODELS[name](), pack(ragged_examples())
    head = head_of(transformers_model(model))
    if frozen:
        head.module.requires_grad_(False)
    results = []
    for how in (score_alone, lambda model, batch: score(model, batch, chunk=7).token_logps):
        model.zero_grad()
        logps = how(model, batch)
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        results.append((logps.detach(), grads))
    (expected, expected_grads), (found, found_grads) = results
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found_grads.keys() == expected_grads.keys()
    assert found_grads
    in_head = [name for name, p in model.named_parameters() if any(p is q for q in head.module.parameters())]
    assert frozen == (not any(name in found_grads for name in in_head))
    for parameter, grad in expected_grads.items():
        assert (found_grads[parameter] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, parameter


@pytest.mark.parametrize("name", ["linear", "wrapped"])
def test_an_output_may_be_named_twice(name):
    hidden, targets = torch.randn(N, HIDDEN, dtype=torch.float64), torch.arange(N) % VOCABULARY
    once = token_scores(HEADS[name], hidden, targets, outputs=("top1", "entropy"))
    twice = token_scores(HEADS[name], hidden, targets, outputs=("top1", "entropy", "top1"))
    assert torch.equal(once.top1, twice.top1)
    assert torch.equal(once.entropy, twice.entropy)


def test_a_second_derivative_is_refused():
    """The backward is not differentiable; asking for more is an error and not a wrong number."""
    hidden = torch.randn(N, HIDDEN, dtype=torch.float64, requires_grad=True)
    logps = token_scores(HEADS["linear"], hidden, torch.arange(N) % VOCABULARY).token_logps
    weights = torch.ones(N, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((logps * weights).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
