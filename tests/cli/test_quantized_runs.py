"""Quantised policies from a run file: each trains, resumes, is saved, loads again and merges. `make test-quantized`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantized import KINDS, needs_bitsandbytes
from tether.models.spec import ModelSpec
from tiny import tiny_model

Tether = Callable[..., tuple[int, str, str]]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "models"
# The packages warn of what they would like to find on other machines.
pytestmark = pytest.mark.filterwarnings("ignore")
SHORT = ("train.max_steps=4", "train.save_steps=2", "data.eval=null", "train.learning_rate=2e-2")


@pytest.fixture
def place(workplace: Any) -> Any:
    """With a model wide enough to be quantised in blocks."""
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(workplace.path / "model")
    return workplace


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(10)[None] + 4).logits


def adapter_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["adapter_off", "snapshot"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_policy_trains_and_resumes(kind: str, method: str, place: Any, tether: Tether) -> None:
    """INV-1, 5, 7: the loss begins at ln 2 and falls; 4 steps are 2, a checkpoint and 2 more."""
    run = (
        "run.yaml",
        *SHORT,
        f"model={{name: model, quantization: {kind}}}",
        f"reference={{meaning: start, method: {method}}}",
    )
    code, _, err = tether("train", *run)
    assert code == 0, err
    assert f"reference: start, by {method}" in err
    lines = (place.path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]
    whole = adapter_in(place.path / "out")
    (place.path / "out" / "checkpoint-4").rename(place.path / "put-away")
    (place.path / "out" / "adapter_model.safetensors").unlink()
    code, _, err = tether("train", *run, "--resume")
    assert code == 0, err
    assert "step 2/4" not in err
    for name, tensor in adapter_in(place.path / "out").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_on_its_quantised_base_and_merges(kind: str, place: Any, tether: Tether) -> None:
    """INV-38: on the quantised base the same to rounding; merged into it, to what that quantisation rounds."""
    assert tether("train", "run.yaml", *SHORT, f"model={{name: model, quantization: {kind}}}")[0] == 0
    plain = logits_of(ModelSpec("model", dtype="float32", quantization=kind).load())
    spec = ModelSpec("out", dtype="float32", quantization=kind)
    again, named = logits_of(spec.load()), ModelSpec("model", dtype="float32", quantization=kind, adapter="out")
    torch.testing.assert_close(logits_of(named.load()), again, rtol=0, atol=1e-5)
    learnt = (again - plain).abs().mean()
    assert learnt > 1e-3
    whole: Any = ModelSpec("out", dtype="float32").load()
    unquantised = logits_of(whole)
    torch.testing.assert_close(logits_of(whole.merge_and_unload()), unquantised, rtol=0, atol=1e-4)
    loaded: Any = spec.load()
    merged = (logits_of(loaded.merge_and_unload()) - again).abs().mean()
    assert 0 < merged < learnt, "merging into quantised weights rounds again, by less than was learnt"


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_over_a_frozen_one_on_a_quantised_base(kind: str, place: Any, tether: Tether) -> None:
    """INV-4: the start is the quantised base with the first adapter."""
    model = f"name: model, quantization: {kind}"
    assert tether("train", "run.yaml", *SHORT, f"model={{{model}}}", "output=first")[0] == 0
    over = f"model={{{model}, adapter: first}}"
    code, _, err = tether("train", "run.yaml", *SHORT, over, "lora={r: 2}", "reference=start", "output=second")
    assert code == 0, err
    lines = (place.path / "second" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == pytest.approx(0.6931, abs=1e-3)
    first, kept = adapter_in(place.path / "first"), adapter_in(place.path / "second" / "frozen")
    assert all(torch.equal(kept[name], tensor) for name, tensor in first.items())


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("kind", KINDS)
def test_without_an_adapter_nothing_could_train(kind: str, place: Any, tether: Tether) -> None:
    """INV-5, before weights are read."""
    code, _, err = tether("train", "run.yaml", f"model={{name: model, quantization: {kind}}}", "lora=null")
    assert code == 2
    assert "quantised and there is no adapter, so nothing could train" in err


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_cannot_be_chosen_to_train(kind: str, place: Any, tether: Tether) -> None:
    """Norms beside the adapter can, and the reference is then a snapshot."""
    model = f"name: model, quantization: {kind}"
    code, _, err = tether("train", "run.yaml", *SHORT, f"model={{{model}, train: [q_proj]}}")
    assert code == 2
    assert "a quantised weight, which cannot train" in err
    code, _, err = tether("train", "run.yaml", *SHORT, f"model={{{model}, train: [norm]}}", "lora={r: 2}")
    assert code == 0, err
    assert "by snapshot" in err


@pytest.mark.parametrize("kind", KINDS)
def test_an_initialisation_that_rewrites_the_base_is_refused_or_right(kind: str, place: Any, tether: Tether) -> None:
    """PiSSA writes into the weights under it; on quantised ones that is PEFT's refusal, in one paragraph."""
    code, _, err = tether(
        "train", "run.yaml", *SHORT, f"model={{name: model, quantization: {kind}}}", "lora={init: pissa}"
    )
    assert code == 2
    assert "PEFT cannot put this adapter on" in err
    assert "Traceback" not in err


@needs_bitsandbytes
def test_the_reference_has_a_quantisation_of_its_own(place: Any, tether: Tether) -> None:
    """Left out, it is the policy's; `none` is none."""
    policy = "model={name: model, quantization: 8bit}"
    starts = []
    for name, reference in (("same", "{model: model}"), ("plain", "{model: model, quantization: none}")):
        code, _, err = tether("train", "run.yaml", *SHORT, policy, f"reference={reference}", f"output={name}")
        assert code == 0, err
        lines = (place.path / name / "metrics.jsonl").read_text().splitlines()
        starts.append(json.loads(lines[0])["loss"])
    assert starts[0] == pytest.approx(0.6931, abs=1e-4)
    assert abs(starts[1] - 0.69315) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_doctor_says_what_is_quantised_and_what_would_train(kind: str, place: Any, tether: Tether) -> None:
    code, out, err = tether("doctor", "model", "model", "--quantization", kind, "--lora", "2", "--dtype", "float32")
    assert code == 0, out + err
    by = "torchao" if kind == "int8" else "bitsandbytes"
    assert f"quantization: {by}, 14 of 21 tensors; these never train" in out
    assert "adapter 'default': LORA, r 2, trains" in out
    assert (
        f"parameters: {sum(p.numel() for p in tiny_model(hidden_size=64, intermediate_size=128).parameters()):,}; "
        in out
    )
    assert "ok: after a pass in evaluation mode a gradient reaches 14 of 28" in out
    code, out, _ = tether("doctor", "model", "model", "--quantization", kind, "--lora", "0")
    assert code == 1
    assert "problem: the weights are quantised and there is no adapter" in out


@needs_bitsandbytes
def test_the_example_trains(place: Any, tether: Tether, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    small = ["train.max_steps=1", "train.batch_size=4", "train.use_cpu=true", "train.logging_steps=1"]
    names = [f"model.name={place.path / 'model'}", f"output={place.path / 'out'}"]
    code, _, err = tether("train", str(EXAMPLES / "qlora.yaml"), *small, *names)
    assert code == 0, err
    assert "step 1/1" in err
