"""A small HTTP server with vLLM's completions protocol over a tiny transformers model, and the ways it may go wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class Faults:
    """What the server does wrong, by name; set on the running server."""

    fail_first = 0  # answers 503 to so many completions
    truncate = 0  # drops so many tokens from the front of the prompt
    without_prompt_logprobs = False
    wrong_tokens = False
    shifted = False  # gives each token the value of the one after it
    context = 4096
    vocabulary: int | None = None
    key: str | None = None
    noise = 0.0
    not_finite = False
    redirect: str | None = None  # an address that every completion is sent on to
    endless = False  # answers without an end
    echo = False  # repeats the request's headers in an error


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, {"object": "list", "data": [{"id": name, "root": name} for name in self.server.names]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        faults = self.server.faults
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            failing, faults.fail_first = faults.fail_first > 0, max(0, faults.fail_first - 1)
        if faults.key and self.headers.get("Authorization") != f"Bearer {faults.key}":
            return self._answer(401, {"error": "wrong key"})
        if faults.redirect:
            return self._answer(307, {}, location=faults.redirect + self.path)
        if faults.echo:
            return self._answer(400, {"error": f"bad request: {dict(self.headers)}"})
        if faults.endless:
            return self._endless()
        if failing:
            return self._answer(503, {"error": "not ready"})
        ids = body["prompt"]
        if len(ids) + body["max_tokens"] > faults.context:
            return self._answer(400, {"message": f"maximum context length is {faults.context} tokens"})
        if faults.vocabulary and max(ids) >= faults.vocabulary:
            return self._answer(400, {"message": f"Token id {max(ids)} is out of vocabulary"})
        self._answer(200, {"choices": [{"index": 0, "text": "", **self._logprobs(ids[faults.truncate :])}]})

    def _logprobs(self, ids: list[int]) -> dict:
        faults = self.server.faults
        if faults.without_prompt_logprobs:
            return {}
        with torch.no_grad(), self.server.lock:
            logits = self.server.model(input_ids=torch.tensor([ids])).logits[0]
        values = logits.float().log_softmax(-1)[:-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0] + faults.noise
        values = values.roll(-1) if faults.shifted else values
        shown = [token + 1 for token in ids] if faults.wrong_tokens else ids
        entries: list[dict | None] = [None]
        for token, value in zip(shown[1:], values.tolist(), strict=True):
            value = float("-inf") if faults.not_finite else value
            entries.append({str(token): {"logprob": value, "rank": 1, "decoded_token": "x"}})
        return {"prompt_logprobs": entries}

    def _endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):  # the client goes away
            while True:
                self.wfile.write(b" " * 2**16)

    def _answer(self, status: int, body: dict, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, model, names: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.names, self.faults = model.eval(), names, Faults()
        self.lock = threading.Lock()
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running(server: Any) -> Iterator[Any]:
    """Answer until the context ends."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving(model, *names: str) -> Iterator[_Server]:
    """Serve a model under some names until the context ends."""
    with running(_Server(model, list(names) or ["tiny"])) as server:
        yield server
