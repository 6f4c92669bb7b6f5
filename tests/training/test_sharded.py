"""A policy in shards has the reference that a whole one has, trains alike, and comes back from disk (INV-7, 36, 38)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tiny import pair_rows, tiny_model, tiny_tokenizer

WORKER = Path(__file__).parent / "sharded_worker.py"
METHODS = {"lora": "adapter_off", "model": "model", "moving model": "model"}
SLOW = [pytest.mark.multiprocess, pytest.mark.slow]
CASES = {
    "fsdp": ["full", "lora", "snapshot", "moving", "moving model", "released", "budget", "model"],
    "zero2": ["full", "lora"],
    "zero3": ["full", "lora", "snapshot", "moving", "released", "budget", "tied", "model"],
}
MARKS = {"fsdp": SLOW, "zero2": [pytest.mark.deepspeed], "zero3": [pytest.mark.deepspeed]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process finds, once for each kind."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp(kind)
            _run([sys.executable, str(WORKER), str(done[kind]), kind, "whole"], done[kind] / "rank0.safetensors")
        return done[kind]

    return run


@pytest.mark.parametrize(
    ("how", "kind"), [pytest.param(how, kind, marks=MARKS[how]) for how, kinds in CASES.items() for kind in kinds]
)
def test_two_processes_with_shards_train_against_the_reference_of_one(how, kind, whole, tmp_path):
    """Log-probs of a probe before and after steps, losses, weights and the figures of an evaluation.

    `full` and `lora` are those of INV-36; `snapshot` is an adapter that starts at random, `moving` is TR-DPO, whose
    checkpoint holds the gathered reference, `model` another model. With `budget`, and in every evaluation, one process
    has more forwards to make than the other. The workers assert how the policy is held, that a pass of the reference
    gives its weights back bit for bit, and that a resumed run ends as the one that was not interrupted.
    """
    one = whole(kind)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    _run([*torchrun, str(WORKER), str(tmp_path), kind, how], tmp_path / "rank1.safetensors")
    expected = load_file(one / "rank0.safetensors")
    for rank in (0, 1):
        assert (tmp_path / f"method{rank}.txt").read_text() == METHODS.get(kind, "snapshot")
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=name)
        moved = (found["after"] - found["before"]).abs().max()
        assert moved > 1e-3 if kind.startswith("moving") else moved <= 1e-5
    if kind.startswith("moving"):
        mine, theirs = (load_file(folder / "checkpoint-4" / "reference.safetensors") for folder in (one, tmp_path))
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(theirs[name], value, atol=2e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(_logits(tmp_path / "saved"), _logits(one / "saved"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=pytest.mark.deepspeed if how.startswith("zero") else SLOW)
        for how in ("accumulated", "ddp", "fsdp", "zero2", "zero3")
    ],
)
def test_twenty_steps_are_those_of_one_process(how, kind, tmp_path):
    """Loss, gradient norm, log-probs and rewards of each step, and so the reference's log-probs (INV-25, INV-36)."""
    found = {}
    for way in ("whole", how):
        (folder := tmp_path / way).mkdir()
        several = way not in ("whole", "accumulated")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if several else []
        last = folder / f"rank{int(several)}.safetensors"
        _run([sys.executable, *launch, str(WORKER), str(folder), kind, way, "trajectory"], last)
        found[way] = load_file(folder / "rank0.safetensors")
    assert len(found[how]["loss"]) == 20
    for name, value in found["whole"].items():
        torch.testing.assert_close(found[how][name], value, atol=1e-5, rtol=1e-4, msg=f"{how} {name}")
        print(f"{how} {kind} {name}: {(found[how][name] - value).abs().max():.1e}")
    assert found["whole"]["loss"][0] - found["whole"]["loss"].min() > 1e-3, "nothing was learnt"


def _logits(saved: Path) -> torch.Tensor:
    """What plain transformers and PEFT say of a few tokens with what was saved."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(pair_rows(1)[0]["chosen"], return_tensors="pt").input_ids
    if (saved / "adapter_config.json").is_file():
        shape = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = PeftModel.from_pretrained(tiny_model(**shape), str(saved))
    else:
        model = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def _run(command: list[str], wrote: Path) -> None:
    # Judged by what was written: torchrun may report an abort after all work is done.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert wrote.is_file(), done.stderr[-3000:]
