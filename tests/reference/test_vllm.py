"""The method `remote` against a real vLLM server on a CPU; `make test-vllm` installs it apart and runs this.

`TETHER_VLLM_PYTHON` names the interpreter of vLLM's own environment.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch

from policies import resolved, take_steps
from tether.errors import ReferencePolicyError
from tether.reference import RemoteOptions
from tether.scoring import pack, score
from tiny import ragged_examples, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.vllm
PROBE = pack(ragged_examples(6))
TOKENIZER = tiny_tokenizer()


def served_model():
    # vLLM's attention on CPUs takes heads of 32 and more.
    return tiny_model(vocab_size=len(TOKENIZER), hidden_size=128, intermediate_size=128)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a vLLM server with the tiny model, served as `tiny` with a context of 64 tokens."""
    python = os.environ.get("TETHER_VLLM_PYTHON")
    if not python:
        pytest.skip("TETHER_VLLM_PYTHON names no interpreter; `make test-vllm` sets it")
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    served_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name"]
    command += ["tiny", "--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--port", str(port)]
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=output, stderr=output, env=environment)
    try:
        for _ in range(600):
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (URLError, OSError):
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start: {log.read_text()[-3000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_vllm_gives_what_is_computed_here(server):
    """Per token to 1e-4, in float32 on both sides, before and after the policy has moved; and proved at the start."""
    policy = served_model()
    expected = score(policy, PROBE).token_logps.detach()
    options = RemoteOptions(url=server, model="tiny")
    reference = resolved(policy, meaning="start", method="remote", remote=options)
    take_steps(policy)
    difference = (reference.score(PROBE).token_logps - expected).abs().max().item()
    print(f"largest difference {difference:.2e} nats over {len(expected)} tokens")
    assert difference < 1e-4


def test_vllm_with_another_model_or_name_or_a_short_context_is_refused(server):
    other = tiny_model(vocab_size=len(TOKENIZER), hidden_size=128, intermediate_size=128, seed=1)
    with pytest.raises(ReferencePolicyError, match="is not the reference 'start'"):
        resolved(other, meaning="start", method="remote", remote=RemoteOptions(url=server))
    with pytest.raises(ReferencePolicyError, match="serves tiny, and sft was asked for"):
        resolved(other, meaning="model", method="remote", remote=RemoteOptions(url=server, model="sft"))
    reference = resolved(other, meaning="model", method="remote", remote=RemoteOptions(url=server))
    assert torch.isfinite(reference.score(PROBE).token_logps).all()
    with pytest.raises(ReferencePolicyError, match="context holds max_length"):
        reference.score(pack(ragged_examples(8, longest=120, seed=3)))


def test_vllm_with_a_smaller_vocabulary_is_refused(server):
    larger = tiny_model(vocab_size=len(TOKENIZER) + 50)
    with pytest.raises(ReferencePolicyError, match="failed after 1 attempts: 400"):
        resolved(larger, meaning="model", method="remote", remote=RemoteOptions(url=server))
