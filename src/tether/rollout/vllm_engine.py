"""Completions from a vLLM server: token ids in and out, weights sent after steps, the proof that they arrived."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from tether.errors import ConfigError, RolloutError
from tether.reference.methods.completions_server import TOKEN_BYTES, CompletionsServer
from tether.reference.methods.transport import ANSWER_BYTES
from tether.reference.spec import RemoteOptions
from tether.rollout.records import Completion, Group, RolloutRequest, Sampling, as_ids
from tether.rollout.weights import exchange_folder, lora_alone, write_adapter, write_merged

logger = logging.getLogger("tether")
_LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Sent:
    """What a sync sent.

    Args:
        kind: `adapter` or `merged`.
        size: bytes.
        seconds: until the server had it.
    """

    kind: str
    size: int
    seconds: float


class VLLMEngine:
    """Samples with a server that reads token ids and the run's weights; see `tether.rollout.records.RolloutEngine`.

    Args:
        options: address, limits and the tolerance of the proof.
        main: whether this process sends weights; each process asks for its own completions.
        run: what adapters are called by, as a server may still hold those of an earlier run.

    Raises:
        ConfigError: the server is on another machine.
        RolloutError: it cannot be reached.
    """

    name = "vllm"
    embedded = False

    def __init__(self, options: RemoteOptions, *, main: bool = True, run: str = "policy") -> None:
        host = urlsplit(options.url).hostname
        if host not in _LOCAL:
            raise ConfigError(
                f"The vLLM server is at {host!r}; weights go through folders that it reads, and endpoints that change "
                f"its weights are open to whoever reaches them, so that it must be on this machine ({_LOCAL[0]})."
            )
        self.options, self._main, self._run = options, main, run
        self._server = CompletionsServer(options, RolloutError)
        self._transport = self._server.transport
        self._folder: Path | None = None
        self.version: int | None = None
        self.sent: list[Sent] = []

    def generate(self, policy: nn.Module, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Group]:
        """A group for each request; every completion is a request with a seed of its own.

        Raises:
            RolloutError: the server fails for good, or answers with other tokens than it can have sampled.
        """
        if sampling.cuts and (sampling.temperature != 1 or sampling.penalises):
            given = "temperature" if sampling.temperature != 1 else "repetition_penalty"
            raise RolloutError(
                f"{given} is {getattr(sampling, given):g} and tokens are cut (top_k, top_p or min_p): a server reports "
                f"log-probs either before the {given} or after the cut, and the trainer needs those between. Set "
                f"{given} to 1, or leave the cut out."
            )
        wanted = [(request, branch) for request in requests for branch in request.branches]
        found = iter(self._transport.many(lambda one: self._completion(one[0], one[1], sampling), wanted))
        return [Group(one, tuple(next(found) for _ in one.branches)) for one in requests]

    def logps(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs of every token but the first, at temperature 1."""
        # One by one: vLLM 0.32 on a CPU ends with an error where it computes two of them at once under an adapter.
        return [found for one in sequences for found in self._server.token_logps([one])]

    def sync(self, policy: nn.Module, version: int) -> None:
        """Give the server the policy's weights under a new name, so that nothing computed with others is served.

        Args:
            policy: the model in training.
            version: of its weights; the same as before: nothing is done.

        Raises:
            RolloutError: the server did not take them.
        """
        if version == self.version:
            return
        found, begun = lora_alone(policy), time.perf_counter()
        kind = "merged" if found is None else "adapter"
        if self._main:
            target = self._of(version)
            if found is not None:
                path = write_adapter(policy, found[0], target)
                self._load_adapter(path, version)
            else:
                write_merged(policy, target)
                self._reload(target)
            size = sum(one.stat().st_size for one in target.rglob("*") if one.is_file())
            self.sent.append(Sent(kind, size, time.perf_counter() - begun))
        if kind == "adapter":
            self._server.model = self._named(version)
        self._forget(version)

    def close(self) -> None:
        """Give connections back and remove what was written."""
        self._transport.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _named(self, version: int) -> str:
        return f"{self._run}-v{version}"

    def _of(self, version: int) -> Path:
        if self._folder is None:
            self._folder = exchange_folder()
        return self._folder / f"{version}"

    def _forget(self, version: int) -> None:
        """Remove the version before; the server has read it, or reads it no more."""
        before, self.version = self.version, version
        if before is None or not self._main:
            return
        if self._server.model == self._named(version):
            body = {"lora_name": self._named(before)}
            self._transport.ask("/unload_lora_adapter", body, repeat=False, text=True)
        shutil.rmtree(self._of(before), ignore_errors=True)

    def _load_adapter(self, path: Path, version: int) -> None:
        """Never under a name and path that it has had: its prefix cache goes by these."""
        body = {"lora_name": self._named(version), "lora_path": str(path)}
        try:
            self._transport.ask("/load_lora_adapter", body, repeat=False, text=True)
        except RolloutError as error:
            raise RolloutError(
                f"The server did not take the adapter: {error} Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, "
                "--enable-lora --max-loras 2 and --max-lora-rank of the adapter's rank or more."
            ) from error

    def _reload(self, folder: Path) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            self._transport.ask("/collective_rpc", body, repeat=False, control=True)
            answer = self._transport.ask("/reset_prefix_cache", {}, repeat=False, control=True)
        except RolloutError as error:
            raise RolloutError(
                f"The server did not take the weights: {error} Start it with VLLM_SERVER_DEV_MODE=1."
            ) from error
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise RolloutError(
                f"The server has new weights and did not drop what it had computed with the old ones: {answer!r}. "
                "Have nothing else ask it while the run does."
            )

    def _completion(self, request: RolloutRequest, branch: int, sampling: Sampling) -> Completion:
        key = int.from_bytes(request.key(branch, sampling.seed)[:8], "little") % 2**31
        body = {
            "model": self._server.model,
            "prompt": request.prompt_ids.tolist(),
            "n": 1,
            "seed": key,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # No end but the run's own: the server's tokenizer may know others, or fewer.
            "ignore_eos": True,
            "stop_token_ids": list(sampling.stop_ids),
            "logprobs": 0,
            "return_token_ids": True,
        }
        if sampling.pattern is not None:
            body["structured_outputs"] = {"regex": sampling.pattern}
        most = ANSWER_BYTES + TOKEN_BYTES * (len(body["prompt"]) + sampling.max_tokens)
        answer = self._transport.ask("/completions", body, most=most)
        try:
            choice = answer["choices"][0]
            ids, finish = list(choice["token_ids"]), choice["finish_reason"]
            logps = list(choice["logprobs"]["token_logprobs"])
            prompt = choice.get("prompt_token_ids")
        except (KeyError, IndexError, TypeError) as error:
            raise RolloutError(
                f"The server at {self._transport.url} answered without token ids or log-probs: "
                f"{self._transport.masked(answer)[:200]}. Use vLLM 0.10 or later."
            ) from error
        self._require(request, sampling, ids, logps, finish, prompt)
        return Completion(as_ids(ids), torch.tensor(logps, dtype=torch.float32), finish)

    def _require(
        self, request: RolloutRequest, sampling: Sampling, ids: list[int], logps: list[float], finish: str, prompt: Any
    ) -> None:
        """Refuse an answer that is no completion of what was asked."""
        ends = [place for place, token in enumerate(ids) if token in sampling.stop_ids]
        problem = ""
        if prompt is not None and list(prompt) != request.prompt_ids.tolist():
            problem = f"it read {len(prompt)} other prompt tokens"
        elif not ids or len(ids) != len(logps):
            problem = f"{len(ids)} tokens and {len(logps)} log-probs"
        elif finish not in ("stop", "length"):
            problem = f"finish_reason is {finish!r}"
        elif ends and (ends[0] != len(ids) - 1 or finish != "stop"):
            problem = "it went on after a token that ends completions"
        elif finish == "length" and len(ids) != sampling.max_tokens:
            problem = f"it was cut off at {len(ids)} of {sampling.max_tokens} tokens; raise its --max-model-len"
        elif not all(isinstance(one, (int, float)) and math.isfinite(one) and one <= 1e-3 for one in logps):
            problem = "a log-prob is none"
        if problem:
            raise RolloutError(
                f"The server at {self._transport.url} gave no completion of row {request.source_row}: {problem}."
            )


class Follows:
    """The proof that a server computes with the policy's weights, now and after every change of them.

    Args:
        engine: the server's.
        score: nats `[N]` of a few fixed sequences by the policy as it is, at temperature 1.
        sequences: these.
        allowed: nats that a token may differ, which rounding explains.
    """

    def __init__(
        self, engine: VLLMEngine, score: Callable[[], Tensor], sequences: list[list[int]], allowed: float
    ) -> None:
        self._engine, self._score, self._sequences, self._allowed = engine, score, sequences, allowed
        self._known: list[tuple[Tensor, Tensor]] = []

    def check(self) -> float:
        """Compare, in both directions.

        Returns:
            Largest difference of a token, in nats.

        Raises:
            RolloutError: the server computes with other weights.
        """
        theirs = torch.tensor([value for row in self._engine.logps(self._sequences) for value in row])
        ours = self._score().float().cpu()
        difference = (theirs - ours).abs().max().item()
        if not difference <= self._allowed:
            raise RolloutError(
                f"The vLLM server does not compute what the trainer does: a token's log-probability differs by "
                f"{difference:.3g} nats (allowed {self._allowed:.0e}). It serves other weights, or in another dtype: "
                "serve the run's model in the run's dtype, or set vllm_tolerance to what its dtype explains."
            )
        for ours_then, theirs_then in self._known:
            self._require_motion(ours - ours_then, theirs - theirs_then, ours_then - theirs_then)
        self._known = [*self._known[:1], (ours, theirs)]
        return difference

    def _require_motion(self, ours: Tensor, theirs: Tensor, apart: Tensor) -> None:
        """Where the trainer has moved by more than the two are apart, the server must have moved with it."""
        if ours.square().mean() <= 9 * apart.square().mean().clamp(min=1e-12):
            return
        share = ((ours * theirs).sum() / ours.square().sum()).item()
        if share < 0.5:
            raise RolloutError(
                f"The policy has moved by {ours.abs().max().item():.3g} nats on a few fixed sequences, and the vLLM "
                f"server by {share:.0%} of it: it still serves earlier weights, or what it had computed with them."
            )


def proof_rows(requests: Sequence[RolloutRequest], vocabulary: int) -> list[list[int]]:
    """Four sequences for the proof: prompts of the run, with drawn tokens after them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for request in requests[:4]:
        further = torch.randint(vocabulary, (8,), generator=generator)
        found.append([*request.prompt_ids.tolist()[-56:], *further.tolist()])
    return found


def told(sent: Sequence[Sent]) -> dict[str, float]:
    """Figures of syncs since the last call, for the log."""
    if not sent:
        return {}
    return {"sync/seconds": sum(one.seconds for one in sent), "sync/bytes": float(sum(one.size for one in sent))}
