"""Two processes sample, judge, train, evaluate and resume as one does, each with the whole policy or a shard of it
(R9, R10, R17, R21)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training.online import policy
from vllm_fake import FakeVLLM, serving_vllm

WORKER = Path(__file__).parent / "worker_online.py"
SERVED = WORKER.with_name("worker_served.py")
_TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process finds."""
    return _run([sys.executable], tmp_path_factory.mktemp("one"), "whole")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "how", ["ddp", "fsdp", *(pytest.param(how, marks=pytest.mark.deepspeed) for how in ("zero2", "zero3"))]
)
def test_two_processes_train_and_evaluate_as_one(how, one, tmp_path):
    """R2, R9, R10: the same completions, rewards over all of them, one gradient; full weights and LoRA, both engines,
    pairs too.

    Processes draw different numbers of tokens, and score different numbers of micro-batches in an evaluation. The
    workers assert how the policy is held, that a resumed run ends in the same bits, and that a reward which raises in
    one process ends both (R21).
    """
    two = _run(_TWO, tmp_path, how)
    expected = load_file(one / "rank0.safetensors")
    for rank in (0, 1):
        found = load_file(two / f"rank{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, atol=5e-5, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_server_has_every_tensor_of_a_policy_in_shards(how, tmp_path):
    """R17: whole weights, or the adapter alone, to the bit what the processes end in; rollouts are those of one
    process with a server of its own."""
    ends, asked = [], []
    for command, name in (([sys.executable], "whole"), (_TWO, how)):
        folder = tmp_path / name
        folder.mkdir()
        with serving_vllm(policy()) as adapters, serving_vllm(policy()) as merged:
            _run(command, folder, name, SERVED, adapters.url, merged.url)
            (adapter,) = [model for name, model in adapters.models.items() if name != "policy"]
            held = {"adapter": adapter.state_dict(), "merged": merged.models["policy"].state_dict()}
            asked.append([sorted(map(str, _sampled(server))) for server in (adapters, merged)])
        found = load_file(folder / "rank0.safetensors")
        for key, value in found.items():
            kind, name = key.split(" ", 1)
            assert torch.equal(held[kind][name], value), key
        assert {key.split(" ")[0] for key in found} == set(held)
        ends.append(found)
    assert asked[0] == asked[1]
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, atol=5e-5, rtol=2e-4, msg=key)


def _sampled(server: FakeVLLM) -> list[Any]:
    """Prompts and seeds of the completions that a run asked for."""
    return [(body["prompt"], body["seed"]) for body in server.paths("/completions") if body["max_tokens"] == 6]


def _run(command: list[str], folder: Path, how: str, worker: Path = WORKER, *more: str) -> Path:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*command, str(worker), str(folder), how, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    # Judged by what was written: torchrun may report an abort after all work is done.
    assert (folder / "rank0.safetensors").is_file(), done.stderr[-3000:]
    return folder
