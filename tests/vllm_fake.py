"""A small HTTP server with the endpoints of vLLM that a run uses, over a transformers model; and its faults."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

from completions_server import running
from tiny import tiny_tokenizer


class Faults:
    """What the server does wrong, by name; set on the running server."""

    ignore_weights = False  # takes new weights and goes on with the old
    refuse_adapters = False
    keep_cache = False  # says that its prefix cache could not be dropped
    other_prompt = False
    short = False  # ends completions early, as one without room does
    without_ids = False
    past_the_end = False
    raw = False  # log-probs before the temperature
    noise = 0.0
    hang = 0.0
    reseed = 0  # draws otherwise than it did before


class _Handler(BaseHTTPRequestHandler):
    server: FakeVLLM

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            return self._answer(200, None)
        self._answer(200, {"object": "list", "data": [{"id": "policy", "root": "policy"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        with self.server.lock, torch.no_grad():
            self.server.asked.append((self.path, body))
            status, answer = getattr(self.server, self.path.strip("/").replace("/", "_"))(body)
        self._answer(status, answer)

    def _answer(self, status: int, body: Any) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class FakeVLLM(ThreadingHTTPServer):
    """Serves `policy`, and adapters under the names that they are loaded by.

    Args:
        model: as the run starts with it, without adapters.
    """

    daemon_threads = True

    def __init__(self, model: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, Any] = {"policy": model.eval()}
        self.base, self.faults, self.tokenizer = model, Faults(), tiny_tokenizer()
        self.lock = threading.Lock()
        self.asked: list[tuple[str, dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def paths(self, ending: str) -> list[dict[str, Any]]:
        return [body for path, body in self.asked if path.endswith(ending)]

    def v1_load_lora_adapter(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, path = body["lora_name"], body["lora_path"]
        if self.faults.refuse_adapters:
            return 400, {"error": {"message": "LoRA rank 16 is greater than max_lora_rank 8."}}
        if name in self.models:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        held = list(self.models.values())
        if self.faults.ignore_weights and len(held) > 1:
            self.models[name] = held[-1]
        else:
            fresh = type(self.base)(self.base.config)
            fresh.load_state_dict(self.base.state_dict())
            self.models[name] = PeftModel.from_pretrained(fresh, path).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def v1_unload_lora_adapter(self, body: dict[str, Any]) -> tuple[int, Any]:
        del self.models[body["lora_name"]]
        return 200, "Success"

    def collective_rpc(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert body["method"] == "reload_weights"
        path = Path(body["kwargs"]["weights_path"])
        assert list(path.glob("*.safetensors"))
        if not self.faults.ignore_weights or len(self.paths("collective_rpc")) == 1:
            self.models["policy"] = AutoModelForCausalLM.from_pretrained(path).eval()
        return 200, {"results": [None]}

    def reset_prefix_cache(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"success": not self.faults.keep_cache}

    def v1_completions(self, body: dict[str, Any]) -> tuple[int, Any]:
        model = self.models[body["model"]]
        if body.get("prompt_logprobs") is not None:
            ids = body["prompt"]
            values = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)[:-1]
            values = values.gather(-1, torch.tensor(ids)[1:, None])[:, 0] + self.faults.noise
            entries = [{str(token): {"logprob": value}} for token, value in zip(ids[1:], values.tolist(), strict=True)]
            return 200, {"choices": [{"index": 0, "text": "", "prompt_logprobs": [None, *entries]}]}
        return 200, {"choices": [self._sampled(model, body)]}

    def _allowed(self, body: dict[str, Any], stops: set[int]) -> torch.Tensor | None:
        """Tokens that a structured output may have: the pattern here is of single tokens, as many as there is room."""
        if "structured_outputs" not in body:
            return None
        (pattern,) = [one for name, one in body["structured_outputs"].items() if name == "regex"]
        texts = [self.tokenizer.decode([token]) for token in range(self.base.config.vocab_size)]
        return torch.tensor(
            [token in stops or re.fullmatch(pattern, one) is not None for token, one in enumerate(texts)]
        )

    def _sampled(self, model: Any, body: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body["seed"] + self.faults.reseed)
        ids, logps, stops = list(body["prompt"]), [], set(body["stop_token_ids"])
        finish, most = "length", body["max_tokens"] - int(self.faults.short)
        allowed = self._allowed(body, stops)
        for _ in range(most):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            if allowed is not None:
                logits = logits.masked_fill(~allowed, -torch.inf)
            processor = RepetitionPenaltyLogitsProcessor(float(body["repetition_penalty"]))
            values = (processor(torch.tensor([ids]), logits[None])[0] / body["temperature"]).log_softmax(-1)
            token = int(torch.multinomial(values.exp(), 1, generator=generator))
            ids.append(token)
            logps.append(((logits.log_softmax(-1) if self.faults.raw else values)[token] + self.faults.noise).item())
            if token in stops and not self.faults.past_the_end:
                finish = "stop"
                break
        written = ids[len(body["prompt"]) :]
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": finish}
        choice["logprobs"] = {"token_logprobs": [min(0.0, one) for one in logps]}
        if not self.faults.without_ids:
            choice["token_ids"] = written
        prompt = body["prompt"]
        choice["prompt_token_ids"] = [1, *prompt] if self.faults.other_prompt else prompt
        return choice


@contextmanager
def serving_vllm(model: Any) -> Iterator[FakeVLLM]:
    """Serve a model until the context ends."""
    with running(FakeVLLM(model)) as server:
        yield server
