"""What differs on a GPU; `make test-gpu` runs it, and then benchmarks/gpu.py.

Without a GPU the same tests run in what a CPU has (`pytest -m gpu tests/on_gpu`), as a check of the tests themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn

from cli.conftest import Workplace
from support.processes import torchrun
from tether import DPOConfig, DPOTrainer
from tether.models.spec import ModelSpec
from tether.reference import ReferenceSpec, resolve
from tether.rollout import RolloutRequest, Sampling, TransformersEngine, TreeEngine
from tether.rollout.proof import as_example
from tether.rollout.records import as_ids
from tether.scoring import choose_layout, pack, score, score_alone
from tether.scoring.attention import flex
from tether.scoring.attention.interface import HALF
from tether.scoring.head import Head, token_scores
from tether.scoring.layout.proof import tolerance
from tiny import CONFIGS, FALLBACK, QUIET, pair_rows, ragged_examples, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.gpu
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BACKENDS = ("flex", "sdpa", "varlen", *(("flash",) if find_spec("flash_attn") else ())) if CUDA else ("blocked", "sdpa")
TREES = [family for family in CONFIGS if family not in FALLBACK]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative error of a gradient by all parameters.
GRADIENTS = {"float32": 1e-3, "bfloat16": 0.1}
COMPILED = 3  # graphs of a kernel: for the first length, for any length, and one for another kind of layer


def gradient(model: nn.Module, values: Tensor, batch: Any) -> Tensor:
    """By all parameters, of a loss in which every completion has a weight of its own."""
    model.zero_grad()
    (values * (1.0 + batch.completion_index)).sum().backward()
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().cpu() for p in model.parameters()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", TREES)
def test_every_backend_scores_and_learns_as_each_sequence_alone(family: str, backend: str, dtype: str) -> None:
    """The oracle matrix, forward and backward (INV-16, 19)."""
    if backend in HALF and dtype == "float32":
        pytest.skip("the kernel computes in half precision")
    model = tiny_model(family).to(DEVICE, DTYPES[dtype]).eval()
    if backend == "varlen" and getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        pytest.skip("the kernel has no softcap")
    if backend in HALF and family == "gpt_oss":
        pytest.skip("the kernel has no sinks")
    config = model.config.get_text_config()
    if dtype == "bfloat16" and any(getattr(config, name, 0) for name in ("num_local_experts", "num_experts")):
        pytest.skip("a rounding may send a token to another expert, whatever computes it")
    batch = pack(ragged_examples()).to(DEVICE)
    alone = score_alone(model, batch)
    expected = gradient(model, alone, batch)
    found = score(model, batch, backend=backend).token_logps
    assert (found - alone).abs().max().item() <= tolerance(model)
    found_gradient = gradient(model, found, batch)
    assert ((found_gradient - expected).norm() / expected.norm()).item() < GRADIENTS[dtype]


def test_a_kernel_is_compiled_a_few_times_for_twenty_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are rounded to whole blocks, so that what was compiled is used again."""
    graphs: list[int] = []

    def counting(module: Any, inputs: Any) -> Any:
        graphs.append(1)
        return module.forward if not CUDA else torch.compile(module)

    torch.compiler.reset()
    kernel = torch.compile(flex.flex_attention, backend="inductor" if CUDA else counting)
    monkeypatch.setattr(flex, "_kernel", lambda: kernel)
    monkeypatch.setattr(flex, "_in_plain_operations", lambda q, k, v, arguments: kernel(q, k, v, **arguments))
    model = tiny_model().to(DEVICE).eval().requires_grad_(False)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for longest in range(10, 210, 10):
            batch = pack(ragged_examples(2, longest=longest, seed=longest)).to(DEVICE)
            found = score(model, batch, backend="flex").token_logps
            torch.testing.assert_close(found, score_alone(model, batch), atol=1e-3, rtol=0)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    torch.compiler.reset()
    assert 0 < compiled <= COMPILED


@pytest.mark.parametrize("keep", ["device", "host"])
def test_a_snapshot_is_where_it_is_said_to_be_and_equal(keep: Any) -> None:
    """The policy's values come back bit for bit, from the device or from pinned memory."""
    policy, probe = tiny_model().to(DEVICE), pack(ragged_examples()).to(DEVICE)
    reference = resolve(ReferenceSpec(keep=keep), policy, probe, score, lambda model: score).reference
    with torch.no_grad():
        start = score(policy, probe).token_logps
        policy.lm_head.weight.mul_(1.1)  # type: ignore[union-attr]
    for value in reference.state().values():
        assert value.device.type == ("cpu" if keep == "host" else DEVICE.type)
        assert value.is_pinned() is (CUDA and keep == "host")
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    found: Any = reference.score(probe)
    assert torch.equal(found.token_logps, start)
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_fused_head_equals_a_plain_one(softcap: float | None, dtype: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 501, bias=False).to(DEVICE, DTYPES[dtype])
    hidden = torch.randn(77, 64, device=DEVICE, dtype=DTYPES[dtype])
    targets = torch.randint(0, 501, (77,), device=DEVICE)
    results = []
    for fused in (True, False):
        leaf = hidden.clone().requires_grad_()
        linear.zero_grad()
        if fused:
            values = token_scores(Head(linear, softcap=softcap), leaf, targets, chunk=16).token_logps
        else:
            logits = linear(leaf).float()
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            values = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        values.sum().backward()
        results.append([values.detach(), leaf.grad.float(), linear.weight.grad.float()])  # type: ignore[union-attr]
    near = {"atol": 1e-4, "rtol": 1e-4} if dtype == "float32" else {"atol": 0.06, "rtol": 0.06}
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, **near)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_what_the_tree_engine_reports_is_what_scoring_gives(family: str) -> None:
    policy = tiny_model(family).to(DEVICE).eval()
    prompts = ([5, 6, 7, 8, 9], [11], [40, 41, 42])
    requests = [RolloutRequest(as_ids(ids), row, range(4)) for row, ids in enumerate(prompts)]
    groups, plain = (
        engine.generate(policy, requests, Sampling(1.0, 14, (2, 7, 13, 21)))
        for engine in (TreeEngine(), TransformersEngine())
    )
    with torch.no_grad():
        alone = score_alone(policy, pack([as_example(group) for group in groups]).to(DEVICE)).cpu()
    reported = torch.cat([one.logps.cpu() for group in groups for one in group.completions])
    torch.testing.assert_close(reported, alone, atol=1e-3, rtol=0)
    ids = [[one.ids.tolist() for group in found for one in group.completions] for found in (groups, plain)]
    assert ids[0] == ids[1]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bits_are_scored_as_a_tree_and_trained_under_an_adapter(tmp_path: Any) -> None:
    tiny_model(vocab_size=320).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = ModelSpec(str(tmp_path / "model"), quantization="4bit").load().to(DEVICE)
    assert choose_layout(model, ragged_examples()).layout == "tree"
    trained = trainer(tmp_path, str(tmp_path / "model"), model_init_kwargs={"quantization": "4bit"})
    trained.train()
    assert trained.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def trainer(folder: Any, model: Any, **options: Any) -> DPOTrainer:
    """Two steps of DPO with an adapter on the device."""
    args = DPOConfig(
        output_dir=str(folder / "run"), max_steps=2, **{**QUIET, "use_cpu": not CUDA, "learning_rate": 1e-2, **options}
    )
    return DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(pair_rows(8)),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_begins_at_its_reference_and_learns(precision: str, tmp_path: Any) -> None:
    run = trainer(tmp_path, tiny_model(vocab_size=320), bf16=precision == "bfloat16")
    assert next(run.policy.parameters()).device.type == DEVICE.type
    run.train()
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(0.6931, abs=2e-3)
    assert losses[1] < losses[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path: Any) -> None:
    work = Workplace(tmp_path)
    work.edit("use_cpu: true", "bf16: false")
    losses = []
    for processes in (1, 2):
        done = subprocess.run(
            [*torchrun(processes), "-m", "tether", "train", "run.yaml", f"output=out{processes}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"[: 2 * processes - 1]},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / f"out{processes}" / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
