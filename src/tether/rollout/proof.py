"""Which engine a run samples with, and the proof that it samples from what the trainer scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tether.errors import RolloutError, ScoringError
from tether.rollout.records import Group, RolloutEngine, RolloutRequest, Sampling
from tether.rollout.sample import penalised, seen_tokens
from tether.rollout.transformers_engine import TransformersEngine
from tether.rollout.tree_engine import TreeEngine
from tether.scoring import pack
from tether.scoring.layout.proof import tolerance
from tether.types import Example, Scores, ScoringBatch

logger = logging.getLogger("tether")
_PROMPTS, _BRANCHES, _TOKENS = 2, 2, 16
# What an engine ends in where it does not fit a model.
_UNFIT = (ScoringError, KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError)


def as_example(group: Group) -> Example:
    """A group as what is scored: its prompt and completions, and which tokens the policy wrote."""
    written = [one.written for one in group.completions]
    masks = [
        torch.ones(len(one.ids), dtype=torch.bool) if mask is None else mask
        for one, mask in zip(group.completions, written, strict=True)
    ]
    ids = tuple(one.ids for one in group.completions)
    scored = None if all(mask is None for mask in written) else tuple(masks)
    images = group.request.images
    if images is not None and len(images.token_types) != len(group.prompt):
        raise RolloutError(
            f"The prompt of row {group.request.source_row} has images, and completions were sampled after other ids "
            f"({len(group.prompt)} tokens in place of {len(images.token_types)}). Return the run's own as 'prompt_ids'."
        )
    return Example(group.prompt, ids, group.request.source_row, scored=scored, images=images)


@dataclass(frozen=True)
class Agreement:
    """How an engine's log-probs compare with the trainer's.

    Args:
        difference: largest of one token, in nats.
        tokens: that were compared.
        allowed: what rounding explains.
    """

    difference: float
    tokens: int
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the engine samples from what the trainer scores."""
        return self.difference <= self.allowed

    @property
    def words(self) -> str:
        """What was measured, for a line."""
        return f"{self.difference:.1e} nats from the trainer's log-probs, {self.tokens} tokens"


def compare(
    engine: RolloutEngine,
    policy: nn.Module,
    score: Callable[[ScoringBatch], Tensor],
    requests: Sequence[RolloutRequest],
    sampling: Sampling,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    *,
    penalty: bool = False,
) -> Agreement:
    """Sample a few short completions, and score them as the trainer does.

    Args:
        engine: an embedded one.
        policy: the model in training.
        score: `token_logps [N]` of a batch at the temperature.
        requests: prompts of the run, at least one.
        sampling: of the run.
        precision: a context of the run's precision, which says what rounding explains.
        penalty: sample with the repetition penalty, which `score` then knows; else without.
    """
    groups = _short_groups(engine, policy, requests, sampling if penalty else replace(sampling, repetition_penalty=1.0))
    return _agreement(engine.name, groups, policy, score, precision)


def _short_groups(
    engine: RolloutEngine, policy: nn.Module, requests: Sequence[RolloutRequest], sampling: Sampling
) -> list[Group]:
    asked = [replace(one, branches=range(_BRANCHES), number="proof") for one in requests[:_PROMPTS]]
    # The trainer knows no pattern: what it leaves of the distribution is the server's to say.
    return engine.generate(policy, asked, replace(sampling, pattern=None, max_tokens=min(_TOKENS, sampling.max_tokens)))


def _agreement(
    name: str,
    groups: Sequence[Group],
    policy: nn.Module,
    score: Callable[[ScoringBatch], Tensor],
    precision: Callable[[], AbstractContextManager[object]],
) -> Agreement:
    theirs = [one.logps for group in groups for one in group.completions]
    device = next(policy.parameters()).device
    ours = score(pack([as_example(group) for group in groups]).to(device)).cpu()
    if any(logps is None for logps in theirs):
        raise RolloutError(f"The engine {name!r} reports no log-probs, so that it cannot be compared.")
    difference = (torch.cat([logps for logps in theirs if logps is not None]) - ours).abs().max().item()
    if difference != difference:
        difference = float("inf")
    with precision():
        return Agreement(difference, len(ours), tolerance(policy))


def with_penalty(scores: Scores, batch: ScoringBatch, penalty: float) -> Tensor:
    """Log-probs `[N]` of what is drawn from with a repetition penalty.

    Args:
        scores: of the batch, with `hidden` and `head`.
        batch: prompts with completions.
        penalty: see `Sampling`.
    """
    assert scores.hidden is not None
    assert scores.head is not None
    logits = scores.head(scores.hidden)
    rows = []
    for example in batch.examples:
        for ids in example.completion_ids:
            sequence = torch.cat([example.prompt_ids, ids])
            rows += [sequence[: len(example.prompt_ids) + place] for place in range(len(ids))]
    known = penalised(logits, seen_tokens(rows, logits.shape[1], logits.device), penalty)
    return known.log_softmax(-1).gather(-1, batch.targets[:, None].to(logits.device))[:, 0]


def choose_engine(
    requested: str,
    policy: nn.Module,
    score: Callable[[ScoringBatch], Tensor],
    requests: Sequence[RolloutRequest],
    sampling: Sampling,
    precision: Callable[[], AbstractContextManager[object]],
    *,
    wide_head: bool = False,
    everywhere: Callable[[bool], bool] = bool,
) -> RolloutEngine:
    """The embedded engine of a run, proved, with a line that says which and why; the same in all processes.

    Args:
        requested: `auto`, `tree` or `transformers`.
        policy: the model in training.
        score: `token_logps [N]` of a batch at the temperature.
        requests: prompts of the run.
        sampling: of the run.
        precision: a context of the run's precision.
        wide_head: see `tether.scoring.score`; `generate` has the model's own.
        everywhere: whether something holds in all processes; each has to call, as scoring may take all of them.

    Raises:
        RolloutError: no engine samples from what the trainer scores.
    """
    tree = TreeEngine(precision, wide_head=wide_head)
    engines: dict[str, RolloutEngine] = {"tree": tree, "transformers": TransformersEngine(precision)}
    reason = ""
    for name, engine in engines.items():
        if requested not in ("auto", name):
            continue
        found, why = _tried(engine, policy, score, requests, sampling, precision, everywhere)
        if found is not None:
            logger.info(f"rollouts: {name} engine, at most {found.words} (allowed {found.allowed:.0e}){reason}")
            _say_what_is_drawn(sampling)
            return engine
        reason += f"; {name} refused: {why}"
    raise RolloutError(
        f"No engine samples from what the trainer scores{reason}. Set engine to auto, or give a rollout_func that "
        "samples from the policy."
    )


def _tried(
    engine: RolloutEngine,
    policy: nn.Module,
    score: Callable[[ScoringBatch], Tensor],
    requests: Sequence[RolloutRequest],
    sampling: Sampling,
    precision: Callable[[], AbstractContextManager[object]],
    everywhere: Callable[[bool], bool],
) -> tuple[Agreement | None, str]:
    """How an engine agrees, where it does in all processes; else why not.

    All learn what each has sampled before the first scores it: an error of one would else leave the others in the
    middle of a pass that takes all.
    """
    groups: list[Group] = []
    found, why = None, ""
    try:
        groups = _short_groups(engine, policy, requests, replace(sampling, repetition_penalty=1.0))
    except _UNFIT as error:
        why = _first_line(error)
    if everywhere(not why):
        try:
            found = _agreement(engine.name, groups, policy, score, precision)
        except _UNFIT as error:
            why = _first_line(error)
        if found is not None and not found.holds:
            why = f"{found.words}, allowed are {found.allowed:.0e}"
        if everywhere(not why):
            return found, ""
    return None, why or "by another process"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _say_what_is_drawn(sampling: Sampling) -> None:
    if replace(sampling, never=()).cuts:
        logger.info(
            "rollouts: tokens are drawn from a part of the policy's distribution (top_k, top_p or min_p); "
            "gradients and ratios are those of the whole one"
        )
    if sampling.penalises:
        logger.info(
            f"rollouts: tokens are drawn with a repetition penalty of {sampling.repetition_penalty:g}; "
            "ratios correct for it"
        )
