"""Held-out pairs after training: their margins under reference and policy, and which tokens moved them; `pairs.json`.

Each process scores all of the pairs, so that shards are gathered alike; the first one writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tether.data import text_tokenizer
from tether.data.prepare.table import example_from_row
from tether.data.show import token_text
from tether.progress import each
from tether.reference.base import frozen_pass
from tether.scoring import pack
from tether.scoring.layout.proof import LOG_PROBS
from tether.training import TetherTrainer
from tether.types import Example, Scores, ScoringBatch

PAIRS = "pairs.json"
# Pairs that are scored, evenly over the set; how many are shown of each kind, and how many tokens of a text.
_SCORED = 256
_SHOWN = 3
_TOKENS = 512


@dataclass(frozen=True)
class ScoredPair:
    """A pair and its log-probabilities.

    Args:
        example: the tokens of prompt, chosen and rejected.
        policy: log-probs of the scored tokens of chosen and of rejected, each `[N]`.
        reference: the same; None without a reference.
    """

    example: Example
    policy: tuple[Tensor, Tensor]
    reference: tuple[Tensor, Tensor] | None

    @property
    def margin(self) -> float:
        """Log-probability of chosen less that of rejected, by the policy, in nats."""
        return _difference(self.policy)

    @property
    def reference_margin(self) -> float:
        """The same by the reference; 0 without one."""
        return 0.0 if self.reference is None else _difference(self.reference)

    @property
    def change(self) -> float:
        """By how many nats the margin is larger than the reference's."""
        return self.margin - self.reference_margin


def write_pairs(trainer: TetherTrainer) -> None:
    """Score held-out pairs by policy and reference and write `pairs.json` into the run folder.

    Nothing is written of a run without held-out pairs, or of a reward model, which has no log-probabilities.

    Args:
        trainer: after training; each process has to call.
    """
    name, rows = _held_out(trainer)
    if rows is None or trainer.args.kind != "pair" or trainer.run.algorithm.measures is not LOG_PROBS or not len(rows):
        return
    places = sorted({round(place) for place in torch.linspace(0, len(rows) - 1, min(len(rows), _SCORED)).tolist()})
    pairs = score_pairs(trainer, [example_from_row(rows[place]) for place in places])
    if not trainer.is_world_process_zero():
        return
    tokenizer = text_tokenizer(cast(Any, trainer.processing_class))
    table: dict[str, Any] = {
        "set": name,
        "of": len(rows),
        "beta": getattr(trainer.args, "beta", None),
        "meaning": trainer.run.reference.identity.meaning,
        "policy": [pair.margin for pair in pairs],
        "reference": None if pairs[0].reference is None else [pair.reference_margin for pair in pairs],
        "shown": [{"why": why, **_written(pair, tokenizer)} for why, pair in remarkable(pairs)],
    }
    path = trainer.run_folder / PAIRS
    path.write_text(json.dumps(table, ensure_ascii=False) + "\n", encoding="utf-8")


def score_pairs(trainer: TetherTrainer, examples: Sequence[Example]) -> list[ScoredPair]:
    """Score pairs as training does, a batch of the evaluation's size at a time.

    Args:
        trainer: whose policy and reference score.
        examples: of two completions each.

    Returns:
        One for each example, in order.
    """
    run, size, found = trainer.run, trainer.args.per_device_eval_batch_size, []
    model = cast(nn.Module, trainer.model_wrapped)
    for start in each(range(0, len(examples), size), "scoring held-out pairs"):
        for part in run.budget.split(pack(examples[start : start + size])):
            batch = part.batch.to(trainer.args.device)
            reference = run.reference.score(batch)
            with frozen_pass(model):
                policy = run.scorer(model, batch)
            found += _pairs_of(batch, policy, reference)
    return found


def remarkable(pairs: Sequence[ScoredPair]) -> list[tuple[str, ScoredPair]]:
    """The pairs to look at, each once, with why.

    Args:
        pairs: all that were scored.

    Returns:
        Those with the lowest margin over the reference's; those whose order training turned round, or else whose margin
        it changed most; those with the highest.
    """
    rising = sorted(range(len(pairs)), key=lambda place: pairs[place].change)
    turned = [place for place in rising[::-1] if pairs[place].reference_margin < 0 < pairs[place].margin]
    fell = [place for place in rising if pairs[place].reference_margin > 0 > pairs[place].margin]
    known = pairs[0].reference is not None
    groups = [
        ("moved the wrong way" if known else "in the wrong order", [p for p in rising if pairs[p].change < 0]),
        ("right before and wrong now", fell if known else []),
        ("wrong before and right now", turned if known else []),
        ("moved furthest the right way" if known else "furthest in the right order", rising[::-1]),
    ]
    found: dict[int, str] = {}
    # One of each kind, then the second of each: a page may show the first few at once.
    for _ in range(_SHOWN):
        for why, places in groups:
            place = next((place for place in places if place not in found), None)
            if place is not None:
                found[place] = why
    return [(why, pairs[place]) for place, why in found.items()]


def _difference(logps: tuple[Tensor, Tensor]) -> float:
    return float(logps[0].sum() - logps[1].sum())


def _held_out(trainer: TetherTrainer) -> tuple[str, Dataset | None]:
    """The first evaluation set, prepared."""
    given: Any = trainer.eval_dataset
    name, rows = next(iter(given.items()), ("", None)) if isinstance(given, dict) else ("", given)
    return name, rows if isinstance(rows, Dataset) and "prompt_ids" in rows.column_names else None


def _pairs_of(batch: ScoringBatch, policy: Scores, reference: Scores | None) -> list[ScoredPair]:
    mine, others = _by_completion(policy), [] if reference is None else _by_completion(reference)
    both = [(mine[at], mine[at + 1], others[at : at + 2]) for at in range(0, 2 * batch.num_examples, 2)]
    return [
        ScoredPair(example, (chosen, rejected), (theirs[0], theirs[1]) if theirs else None)
        for example, (chosen, rejected, theirs) in zip(batch.examples, both, strict=True)
    ]


def _by_completion(scores: Scores) -> list[Tensor]:
    logps, index = scores.token_logps.float().cpu(), scores.completion_index.cpu()
    return [logps[index == number] for number in range(scores.num_completions)]


def _written(pair: ScoredPair, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A pair as plain values: texts of tokens, each with the policy's log-prob less the reference's."""
    prompt = pair.example.prompt_ids[-_TOKENS:].tolist()
    reference = pair.reference or (None, None)
    sides = [_side(pair, place, pair.policy[place], reference[place], tokenizer) for place in (0, 1)]
    return {
        "row": pair.example.source_row,
        "prompt": "".join(token_text(token, tokenizer) for token in prompt),
        "margin": pair.margin,
        "reference_margin": None if pair.reference is None else pair.reference_margin,
        "chosen": sides[0],
        "rejected": sides[1],
    }


def _side(
    pair: ScoredPair, place: int, policy: Tensor, reference: Tensor | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    ids = pair.example.completion_ids[place]
    scored = (
        torch.ones(len(ids), dtype=torch.bool) if pair.example.scored is None else pair.example.scored[place].bool()
    )
    ratios: list[float | None] = [None] * len(ids)
    if reference is not None:
        # Where a prompt is empty, its completion's first token is predicted by nothing and has no score.
        where = scored.nonzero().flatten()[-len(policy) :].tolist()
        for at, ratio in zip(where, (policy - reference).tolist(), strict=True):
            ratios[at] = round(ratio, 4)
    tokens = [[token_text(token, tokenizer), ratio] for token, ratio in zip(ids.tolist(), ratios, strict=True)]
    return {
        "tokens": tokens[:_TOKENS],
        "left_out": max(len(tokens) - _TOKENS, 0),
        "logp": float(policy.sum()),
        "reference_logp": None if reference is None else float(reference.sum()),
    }
