"""Every attention backend of the tree layout gives what the segmented one gives (INV-19), or refuses."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from tether.errors import ConfigError, ScoringError
from tether.scoring import choose_layout, pack, score, score_alone
from tether.scoring.attention import flash as attention_flash
from tether.scoring.attention import flex as attention_flex
from tether.scoring.attention import interface as attention
from tether.scoring.attention import varlen as attention_varlen
from tether.scoring.attention.interface import backends_for, tree_attention
from tether.types import Example, Forest, Tree
from tiny import CONFIGS, FALLBACK, ragged_examples, tiny_model

TREES = [family for family in CONFIGS if family not in FALLBACK]
EXAMPLES = [
    *ragged_examples(),
    *ragged_examples(2, completions=3, seed=1),
    Example.of([], [[5, 6, 7], [8, 9]], scored=[[False, True, True], [False, True]]),
]
OPTIONS = {
    "plain": {},
    "scaled": {"scaling": 0.7},
    "softcapped": {"softcap": 2.0},
    "windowed": {"sliding_window": 4},
    "windowed and softcapped": {"sliding_window": 4, "softcap": 2.0, "scaling": 0.7},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -2.0])},
}


def tensors(query_heads, dtype=torch.float32):
    torch.manual_seed(0)
    forest = pack(EXAMPLES).forest
    shapes = ((query_heads, forest.length), (2, forest.length), (2, forest.length))
    return forest, [torch.randn(1, heads, length, 8, dtype=dtype) for heads, length in shapes]


def varlen_stand_in(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """What FlashAttention documents of its variable-length function, sequence by sequence in plain operations."""
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    outputs = []
    for (q0, q1), (k0, k1) in zip(
        cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_seqlens_k.unfold(0, 2, 1).tolist(), strict=True
    ):
        assert q1 - q0 <= max_seqlen_q
        assert k1 - k0 <= max_seqlen_k
        groups = q.shape[1] // k.shape[1]
        keys, values = k[k0:k1].repeat_interleave(groups, 1), v[k0:k1].repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * (softmax_scale or q.shape[-1] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


@pytest.fixture
def flash_installed(monkeypatch):
    """The package's place taken by the stand-in, in float32 and on a CPU."""
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = varlen_stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention_flash, "DTYPES", (torch.float32,))
    monkeypatch.setattr(attention, "flash_problem", lambda device: "")


def torch_varlen_stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    """What torch documents of `varlen_attn`, of a causal window."""
    assert window_size[1] == 0
    assert enable_gqa is (query.shape[1] != key.shape[1])
    return varlen_stand_in(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, causal=True, window_size=window_size
    )


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    """The kernel's place taken by the stand-in, in float32 and on a CPU."""
    monkeypatch.setattr(attention_varlen, "_kernel", lambda: torch_varlen_stand_in)
    monkeypatch.setattr(attention_varlen, "DTYPES", (torch.float32,))
    monkeypatch.setattr(attention, "varlen_problem", lambda device: "")


@pytest.mark.sweep(6)
@pytest.mark.parametrize("heads", [2, 4, 6], ids=lambda heads: f"{heads} query heads over 2")
@pytest.mark.parametrize("name", OPTIONS)
def test_flex_attention_equals_the_segmented_form(name, heads):
    forest, states = tensors(heads)
    options = dict(OPTIONS[name])
    if "s_aux" in options:
        options["s_aux"] = options["s_aux"][:heads]
    expected = tree_attention(nn.Identity(), *states, forest, **options)
    with torch.no_grad():
        found = tree_attention(nn.Identity(), *states, forest, tree_backend="flex", **options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["blocked", "flash", "varlen"])
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "sinks"])
def test_blocks_and_flash_attention_equal_the_segmented_form(name, backend, flash_installed, varlen_on_cpu):
    """Values, and gradients through the trunk's keys, which stand in several of the kernel's sequences."""
    forest, states = tensors(6)
    if backend == "varlen" and "softcap" in OPTIONS[name]:
        with pytest.raises(ScoringError, match="has no softcap"):
            tree_attention(nn.Identity(), *states, forest, tree_backend=backend, **OPTIONS[name])
        return
    results = []
    for used in (backend, "sdpa"):
        leaves = [state.clone().requires_grad_() for state in states]
        found = tree_attention(nn.Identity(), *leaves, forest, tree_backend=used, **OPTIONS[name])
        (found * torch.linspace(-1, 1, found.shape[1])[None, :, None, None]).sum().backward()
        results.append([found.detach(), *(leaf.grad for leaf in leaves)])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_how_flash_attention_is_told_a_forest():
    forest = Forest((Tree(0, 2, (1, 2)), Tree(5, 0, (2, 1))))
    told = attention_flash.segments(forest, torch.device("cpu"))
    assert told.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert told.query_edges.tolist() == [0, 3, 5, 7, 8]
    assert told.key_edges.tolist() == [0, 3, 7, 9, 10]
    assert (told.longest_query, told.longest_key) == (3, 4)


@pytest.mark.sweep(6)
@pytest.mark.parametrize("family", TREES)
def test_models_score_alike_with_flex_attention(family):
    model, batch = tiny_model(family).eval().requires_grad_(False), pack(ragged_examples())
    with torch.no_grad():
        found = score(model, batch, backend="flex").token_logps
        torch.testing.assert_close(found, score_alone(model, batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "masks"), [("llama", 1), ("gemma3", 2)])
def test_one_block_mask_for_each_window_whatever_the_number_of_layers(family, masks, monkeypatch):
    built = []
    build = attention_flex.create_block_mask
    monkeypatch.setattr(attention_flex, "create_block_mask", lambda *a, **k: (built.append(1), build(*a, **k))[1])
    model = tiny_model(
        family,
        num_hidden_layers=4,
        **({"layer_types": ["sliding_attention", "full_attention"] * 2} if masks == 2 else {}),
    )
    batch = pack(ragged_examples())
    with torch.no_grad():
        for _ in range(2):
            score(model.requires_grad_(False), batch, backend="flex")
    assert len(built) == masks


def test_a_wrong_block_mask_is_caught(monkeypatch):
    """INV-16, negative control: a mask under which merged rows leak fails the oracle and the start-up proof."""
    shared = [Example.of([5, 6, 7], [[8, 9, 10], [11, 12]]), Example.of([5, 6, 7], [[13, 14, 15]])]
    model, batch = tiny_model().requires_grad_(False), pack(shared)
    original = attention_flex.block_mask

    def leaking(forest, window, device):
        tree = forest.trees[0]
        return original(Forest((replace(tree, branches=(sum(tree.branches),)),)), window, device)

    monkeypatch.setattr(attention_flex, "block_mask", leaking)
    with torch.no_grad():
        assert (score(model, batch, backend="flex").token_logps - score_alone(model, batch)).abs().max() > 1e-2
    with pytest.raises(ScoringError, match=r"tree layout, flex attention refused.*Leave `attention_backend` unset"):
        choose_layout(model, shared, backend="flex")


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_a_wrong_index_of_keys_is_caught(backend, monkeypatch, flash_installed, varlen_on_cpu):
    """INV-16, negative control: keys of another branch in a branch's sequence."""
    model, examples = tiny_model(), ragged_examples()
    assert choose_layout(model, examples, backend=backend).backend == backend
    original = attention_flash.segments
    monkeypatch.setattr(
        attention_flash, "segments", lambda *given: (told := original(*given))._replace(keys=told.keys.roll(1))
    )
    with pytest.raises(ScoringError, match=f"tree layout, {backend} attention refused"):
        choose_layout(model, examples, backend=backend)


def test_what_is_asked_of_torch_is_what_it_documents():
    """The call binds to the signature of the function that is there."""
    seen = {}

    def kernel(*given, **named):
        seen.update(inspect.signature(varlen_attn).bind(*given, **named).arguments)
        return given[0]

    forest, states = tensors(6, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_varlen, "_kernel", lambda: kernel)
        found = tree_attention(nn.Identity(), *states, forest, tree_backend="varlen", sliding_window=4, scaling=0.5)
    assert found.shape == (1, forest.length, 6, 8)
    assert (seen["window_size"], seen["scale"], seen["enable_gqa"]) == ((3, 0), 0.5, True)
    assert seen["cu_seq_k"][-1] == len(seen["key"]) == len(seen["value"])


def test_rows_are_rounded_to_whole_blocks():
    assert [attention_flex.rounded(length) for length in (1, 128, 129)] == [128, 128, 256]
    forest = pack(ragged_examples()).forest
    whole = attention_flex.rounded(forest.length)
    assert attention_flex.block_mask(forest, None, torch.device("cpu")).shape[-2:] == (whole, whole)


def test_the_devices_first_choice():
    assert backends_for("cpu", gradients=True) == ("blocked",)
    assert backends_for("cuda", gradients=True) == ("flex", "sdpa")
    assert backends_for("cuda", gradients=True, requested="sdpa") == ("sdpa",)


def test_backends_that_cannot_work_are_refused():
    """INV-18: clearly, and before anything is trained."""
    model, examples = tiny_model(), ragged_examples()
    with pytest.raises(ConfigError, match=r"flex.*no backward on a CPU.*sdpa"):
        choose_layout(model, examples, backend="flex")
    with pytest.raises(ScoringError, match="no backward on a CPU"):
        score(model, pack(examples), backend="flex")
    with pytest.raises(ConfigError, match=r"flash.*runs on CUDA"):
        choose_layout(model, examples, backend="flash")
    with pytest.raises(ConfigError, match="allowed are auto, blocked, sdpa, flex, varlen, flash"):
        score(model, pack(examples), backend="paged")
    with pytest.raises(ConfigError, match="Leave attention_backend at auto"):
        choose_layout(model, examples, requested="padded", backend="sdpa")
    forest, states = tensors(2)
    with pytest.raises(ScoringError, match="has no dropout"):
        tree_attention(nn.Identity(), *states, forest, tree_backend="flex", dropout=0.1)
    with pytest.raises(ScoringError, match="no attention sinks"):
        tree_attention(nn.Identity(), *states, forest, tree_backend="flash", s_aux=torch.zeros(2))
    for backend in ("flash", "varlen"):
        with pytest.raises(ScoringError, match="computes in float16 and bfloat16"):
            tree_attention(nn.Identity(), *states, forest, tree_backend=backend)
    for asked, words in (({"dropout": 0.1}, "no dropout"), ({"s_aux": torch.zeros(2)}, "no attention sinks")):
        with pytest.raises(ScoringError, match=words):
            tree_attention(nn.Identity(), *states, forest, tree_backend="varlen", **asked)
    with pytest.raises(ConfigError, match=r"varlen.*runs on CUDA"):
        choose_layout(model, examples, backend="varlen")
