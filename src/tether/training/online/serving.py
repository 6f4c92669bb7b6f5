"""The vLLM server of a run: given or started, sent the policy's weights before rollouts, proved to follow them."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from tether.errors import RolloutError
from tether.models.structure import dtype_of, transformers_model
from tether.reference import RemoteOptions
from tether.reference.methods.shards import gathered
from tether.rollout import RolloutRequest, Sampling
from tether.rollout.proof import Agreement, compare, with_penalty
from tether.rollout.vllm_engine import Follows, VLLMEngine, proof_rows, told
from tether.rollout.vllm_server import ServerOptions, VLLMServer
from tether.rollout.weights import exchange_folder, lora_alone, write_merged
from tether.scoring import pack, score_alone, tolerance
from tether.training.algorithms.base import Passes, Result
from tether.types import Example, ScoringBatch

logger = logging.getLogger("tether")


@dataclass(frozen=True)
class Serving:
    """What a configuration says of the server.

    Args:
        url: of one that runs already; None: the run starts one.
        python: interpreter that has vLLM, to start one.
        timeout: seconds of a request, and of the start.
        concurrency: requests under way at once.
        tolerance: nats that a token may differ; None: what the dtype explains.
        memory: share of a device's memory of an own server.
        devices: of an own server.
        context: tokens that an own server has room for.
        log: file of an own server.
        save_tokenizer: writes the tokenizer into a folder, for an own server.
    """

    url: str | None
    python: str | None
    timeout: float
    concurrency: int
    tolerance: float | None
    memory: float
    devices: int
    context: int
    log: Path
    save_tokenizer: Callable[[Path], object]


class Served:
    """An engine that follows the policy.

    Args:
        serving: the server.
        passes: of the run.
        requests: prompts of the run, at least one.
        sampling: of the run.

    Raises:
        RolloutError: the server does not start, cannot be reached, or computes something else than the trainer.
    """

    def __init__(
        self, serving: Serving, passes: Passes, requests: Sequence[RolloutRequest], sampling: Sampling
    ) -> None:
        self._passes, self._own = passes, None
        self._begun: dict[str, float] = {}
        self._main = passes.accelerator.is_main_process
        with gathered(passes.model()):  # weights are whole in every process, and no forward takes another
            self._begin(serving, requests, sampling)

    def _begin(self, serving: Serving, requests: Sequence[RolloutRequest], sampling: Sampling) -> None:
        accelerator, policy = self._passes.accelerator, self._passes.model()
        url, run = self._from_main(
            lambda: (serving.url or self._start(serving, sampling), f"tether-{secrets.token_hex(4)}")
        )
        options = RemoteOptions(
            url=url, concurrency=serving.concurrency, timeout=serving.timeout, tolerance=serving.tolerance, retries=2
        )
        self.engine = VLLMEngine(options, main=self._main, run=run)
        with accelerator.autocast():
            allowed = serving.tolerance or tolerance(policy)
        rows = proof_rows(requests, transformers_model(policy).config.get_text_config().vocab_size)
        examples = [Example.of(row[:1], [row[1:]]) for row in rows]
        device = next(policy.parameters()).device

        def scored() -> torch.Tensor:
            with torch.no_grad(), accelerator.autocast():
                return score_alone(policy, pack(examples).to(device))

        self._follows = Follows(self.engine, scored, rows, allowed)
        self._begun = self.bring()  # the first rollout's log has it

        def at_once(batch: ScoringBatch) -> torch.Tensor:
            if not sampling.penalises:
                return self._passes.policy(batch).token_logps
            scores = self._passes.policy(batch, outputs=("hidden",))
            return with_penalty(scores, batch, sampling.repetition_penalty)

        def agreement() -> Agreement:
            given = self.engine, policy, at_once, requests, sampling, lambda: accelerator.autocast()
            found = compare(*given, penalty=True)
            if not found.difference <= allowed:
                raise RolloutError(
                    f"The vLLM server's log-probs of what it samples differ by {found.difference:.3g} nats from the "
                    f"trainer's (allowed {allowed:.0e}), and those of prompts do not. Start it with --logprobs-mode "
                    + ("raw_logprobs" if sampling.cuts else "processed_logprobs")
                    + ", so that they are of the distribution at the temperature, before any cut."
                )
            return found

        found = self._together(agreement)
        if sampling.pattern is not None:
            logger.info("rollouts: completions are held to a regular expression; ratios correct for it")
        sent = self.engine.sent[-1].kind if self.engine.sent else "weights"
        logger.info(
            f"rollouts: vllm engine at {url}, at most {found.words} (allowed {allowed:.0e}); the server is sent {sent} "
            "weights"
        )

    def bring(self) -> dict[str, float]:
        """Send the policy as it is, and prove that the server has it.

        Returns:
            Figures for the log; empty where nothing had changed since the last rollout.

        Raises:
            RolloutError: in every process, where one fails.
        """
        step = int(getattr(self._passes.state(), "global_step", 0))
        if step == self.engine.version:
            begun, self._begun = self._begun, {}
            return begun
        policy = self._passes.model()
        with gathered(policy):
            # The main process sends before any other asks.
            self._together(lambda: self.engine.sync(policy, step) if self._main else None)
            if not self._main:
                self.engine.sync(policy, step)
            difference = self._together(self._follows.check)
        sent, self.engine.sent = self.engine.sent[-1:], self.engine.sent[-1:]
        return {**told(sent), "sync/logp_difference": difference}

    def close(self) -> None:
        """Stop an own server."""
        self.engine.close()
        if self._own is not None:
            self._own.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, serving: Serving, sampling: Sampling) -> str:
        policy, folder = self._passes.model(), exchange_folder()
        lora = lora_alone(policy)
        logger.info(f"rollouts: starting a vLLM server with {serving.python}; its log is {serving.log}")
        write_merged(policy, folder, base=lora is not None)
        serving.save_tokenizer(folder)
        options = ServerOptions(
            Path(str(serving.python)),
            str(dtype_of(policy)).removeprefix("torch."),
            serving.context,
            0 if lora is None else lora[1],
            serving.memory,
            serving.devices,
            serving.timeout,
            sampling.cuts,
        )
        self._own, self._folder = VLLMServer(folder, options, serving.log), folder
        return self._own.url

    def _from_main(self, make: Callable[[], tuple[str, str]]) -> tuple[str, str]:
        """What the main process has made, in all."""
        values = [self._together(lambda: make() if self._main else None)]
        if self._passes.accelerator.num_processes > 1:
            broadcast_object_list(values)
        assert values[0] is not None
        return values[0]

    def _together(self, call: Callable[[], Result]) -> Result:
        """The error of one process reaches all, so that none waits for it."""
        return self._passes.together(call, "The server", RolloutError)
