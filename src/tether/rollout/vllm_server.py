"""A vLLM server that a run starts for itself, on this machine, with an interpreter of its own, and stops at its end."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from tether.errors import ConfigError, RolloutError

_PAUSE = 0.5
# The server ends with the run, also where that was killed and could tell nobody.
_SUPERVISE = """
import os, signal, subprocess, sys, time
parent, command = int(sys.argv[1]), sys.argv[2:]
child = subprocess.Popen(command)
while child.poll() is None:
    if os.getppid() != parent:
        os.killpg(0, signal.SIGKILL)
    time.sleep(0.5)
sys.exit(child.returncode)
"""
_LOG_LINES = 12
# On a CPU: as the installation needs it (`make test-vllm`); elsewhere vLLM decides.
_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True)
class ServerOptions:
    """How a server of the run's own is started.

    Args:
        python: interpreter of vLLM's environment, which pins other versions than Tether's.
        dtype: of its weights, as the policy's.
        context: tokens of a prompt and its completion.
        lora_rank: of the adapter that is sent; 0: all weights are.
        memory: share of a device's memory.
        devices: that hold one model.
        start_seconds: until it must answer.
        cuts: completions are sampled with a cut (`Sampling.cuts`), before which log-probs are reported.
    """

    python: Path
    dtype: str
    context: int
    lora_rank: int = 0
    memory: float = 0.3
    devices: int = 1
    start_seconds: float = 600.0
    cuts: bool = False


class VLLMServer:
    """Starts with the constructor and stops with `close`, or when the process ends.

    Args:
        model: folder with weights, configuration and tokenizer.
        options: see `ServerOptions`.
        log: file that takes what it prints.

    Raises:
        ConfigError: the interpreter does not exist.
        RolloutError: the server did not start; with the end of its log.
    """

    def __init__(self, model: Path, options: ServerOptions, log: Path) -> None:
        python = shutil.which(str(options.python.expanduser()))
        if python is None:
            raise ConfigError(f"vllm_python is {options.python}, which cannot be run. Name the Python that has vLLM.")
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._log, self._options = log, options
        log.parent.mkdir(parents=True, exist_ok=True)
        # A session of its own, so that its workers end with it, and an interrupt of the run does not reach it first.
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SUPERVISE, str(os.getpid()), python, *_arguments(model, options, self._port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(options),
                start_new_session=True,
            )
        atexit.register(self.close)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop it, and wait until it has gone."""
        atexit.unregister(self.close)
        if self._process.poll() is not None:
            return
        for sign, seconds in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 20.0)):
            try:
                os.killpg(self._process.pid, sign)
                self._process.wait(seconds)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def _wait(self) -> None:
        opener, end = build_opener(ProxyHandler({})), time.monotonic() + self._options.start_seconds
        while True:
            if self._process.poll() is not None:
                raise RolloutError(f"The vLLM server ended with code {self._process.returncode}. {self._said()}")
            try:
                with opener.open(f"{self.url}/health", timeout=5):
                    return
            except (URLError, OSError):
                if time.monotonic() > end:
                    raise RolloutError(
                        f"The vLLM server did not answer within {self._options.start_seconds:g} seconds. {self._said()}"
                    ) from None
                time.sleep(_PAUSE)

    def _said(self) -> str:
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()[-_LOG_LINES:]
        return f"Its log {self._log} ends with:\n" + "\n".join(lines)


def _arguments(model: Path, options: ServerOptions, port: int) -> Sequence[str]:
    found = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "policy"]
    found += ["--host", "127.0.0.1", "--port", str(port), "--dtype", options.dtype]
    # Log-probs of the distribution at the temperature, which vLLM has after a cut alone: with one, where the
    # temperature is 1, those before both. What the checkpoint says of sampling is not taken up.
    mode = "raw_logprobs" if options.cuts else "processed_logprobs"
    found += ["--logprobs-mode", mode, "--generation-config", "vllm", "--max-logprobs", "1"]
    found += ["--max-model-len", str(options.context), "--tensor-parallel-size", str(options.devices)]
    found += ["--gpu-memory-utilization", str(options.memory), "--enforce-eager"]
    if options.lora_rank:
        found += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", str(_allowed_rank(options.lora_rank))]
    return found


def _allowed_rank(rank: int) -> int:
    """The smallest that vLLM allows: 8, 16, … 512."""
    found = 8
    while found < rank:
        found *= 2
    return found


def _environment(options: ServerOptions) -> dict[str, str]:
    # Tether's own path would put its transformers before vLLM's.
    found = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    found |= {name: found.get(name, value) for name, value in _ON_CPU.items()}
    found |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}
    return found | ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if options.lora_rank else {})


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
