"""bitsandbytes still has the places that `tether.compat.bitsandbytes` names, and they do what is relied on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tether.compat.bitsandbytes import keep_quantized_layout

bitsandbytes = pytest.importorskip("bitsandbytes", reason="`make test-quantized` installs it apart")


@pytest.fixture
def matmul(monkeypatch):
    """The package's own product, which the test may replace."""
    plain = getattr(bitsandbytes.matmul, "__wrapped__", bitsandbytes.matmul)
    monkeypatch.setattr(bitsandbytes, "matmul", plain)
    return plain


def test_4_bit_layers_ask_support_avx512bf16_for_cpu_before_they_repack():
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    model = nn.Sequential(layer)
    keep_quantized_layout(model)
    assert layer.support_avx512bf16_for_cpu is False
    inputs = torch.randn(2, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        model.eval()(inputs)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    inputs.requires_grad_()
    model.train()(inputs).sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.abs().sum() > 0


def test_matmul_is_looked_up_in_the_package_and_takes_a_state_with_is_training(matmul):
    layer = bitsandbytes.nn.Linear8bitLt(32, 32, bias=False, has_fp16_weights=False).to("cpu")
    keep_quantized_layout(nn.Sequential(layer))
    assert bitsandbytes.matmul is not matmul
    assert bitsandbytes.matmul.in_both_modes
    seen = []
    ours = bitsandbytes.matmul

    def watched(values, *args, state=None, **kwargs):
        answer = ours(values, *args, state=state, **kwargs)
        seen.append(state.is_training)
        return answer

    watched.in_both_modes = True
    bitsandbytes.matmul = watched
    with torch.no_grad():
        layer.eval()(torch.randn(2, 32))
    assert seen == [True]
