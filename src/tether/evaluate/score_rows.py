"""Rows scored by a policy and its reference: log-probs, implicit rewards and KL of each completion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from tether.data import Prepared, example_from_row, load_rows, prepare, read_preferences
from tether.errors import ConfigError, DataError, ScoringError
from tether.evaluate.named_models import Loaded, NamedModel
from tether.models.load import load_config, load_processing
from tether.objectives.contrast import CONTRASTS, shaped_reward
from tether.objectives.preference_loss import Numbers
from tether.progress import each
from tether.reference import refuse_other_tokenizer
from tether.scoring import choose_layout, pack, score
from tether.scoring.divergence import token_divergence, with_frozen_head
from tether.scoring.layout.proof import LOG_PROBS
from tether.scoring.reward import REWARDS, reward
from tether.training import CPOConfig, DPOConfig, ORPOConfig, PreferenceConfig
from tether.types import Example, Kind, Scores, ScoringBatch

# Tokens of a forward where no run says how many.
MAX_TOKENS = 2048
BETA = 0.1
_PROBE_ROWS = 4


@dataclass(frozen=True)
class Reading:
    """How rows are read; what is None is as the policy's run reads them, else `prepare`'s defaults.

    Args:
        kind: of the rows.
        max_length: tokens of prompt and completion together.
        max_tokens: of a forward.
        beta: what log-ratios are multiplied by; None: the reward of the run's own objective, else 0.1.
    """

    kind: Kind = "pair"
    max_length: int | None = None
    max_tokens: int = MAX_TOKENS
    beta: float | None = None


@dataclass(frozen=True)
class ScoredRows:
    """R rows with K completions in all.

    Args:
        rows: as they came.
        source_rows: R, the number of each row in `rows`.
        sizes: R, completions of each.
        tokens: int `[K]`, scored tokens of each completion.
        logps: float `[K]`, of the policy; None for a reward model.
        reference_logps: float `[K]`; None without a reference.
        rewards: float `[K]`: implicit rewards, or those of a reward model.
        kl: float `[K]`, nats per token: KL(policy, reference) at each scored token, averaged over a completion; None
            where it cannot be had, for which `no_kl` has the reason.
        rule: what the rewards are, in words.
        scoring: how they were computed, and the proof of it.
        proved: whether the reference's weights have the hash that its run recorded.
        trained_on: whether the policy's run was trained on just these rows.
    """

    rows: Dataset
    source_rows: np.ndarray
    sizes: np.ndarray
    tokens: np.ndarray
    logps: np.ndarray | None
    reference_logps: np.ndarray | None
    rewards: np.ndarray
    kl: np.ndarray | None
    no_kl: str
    rule: str
    scoring: str
    proved: bool | None
    trained_on: bool

    @property
    def margins(self) -> np.ndarray:
        """Of pairs, `[R]`: reward of the chosen less that of the rejected."""
        return self.rewards[0::2] - self.rewards[1::2]


def load_for(source: Any, reading: Reading, columns: Sequence[str] = ()) -> Dataset:
    """Rows, with the columns that will be asked for; before any weights load.

    Raises:
        DataError: there are none, they are of another kind, or lack a column.
    """
    rows = load_rows(source, kind=reading.kind, name="data")
    for column in columns:
        if column not in rows.column_names:
            raise DataError(f"The rows have no column {column!r}; they have {', '.join(rows.column_names)}.")
    read_preferences(rows, kind=reading.kind, name="data")
    return rows


def score_rows(
    rows: Dataset,
    policy: Loaded,
    reference: Loaded | None,
    reading: Reading,
    *,
    wants_kl: bool = True,
) -> ScoredRows:
    """Score every completion of the rows that can be used.

    Args:
        rows: see `load_for`.
        policy: a model that was named; a reward model has no reference.
        reference: what it is compared with.
        reading: how the rows are read.
        wants_kl: compute the KL too, which needs both models' logits.

    Raises:
        DataError: no row is left of them.
        ConfigError: the two models have other tokens, or a reward model was given a reference.
    """
    if reference is not None:
        if policy.named.classifies or reference.named.classifies:
            raise ConfigError("A reward model has no log-probabilities to compare: leave the reference out.")
        refuse_other_tokenizer(policy.tokenizer, reference.tokenizer)
    prepared = _prepared(rows, policy.named, reading, policy.processing)
    examples, trained = _examples(prepared), policy.named.trained
    choice = _layout(policy, examples)
    found = _Pass(policy, reference, choice.options, _layout(reference, examples).options if reference else {})
    no_kl = found.why_no_kl(examples, wants_kl)
    found = replace(found, kl=not no_kl)
    values = found.over(examples, reading)
    return ScoredRows(
        rows=rows,
        source_rows=np.array([example.source_row for example in examples]),
        sizes=np.array([len(example.completion_ids) for example in examples]),
        tokens=values["tokens"].astype(np.int64),
        logps=values.get("logps"),
        reference_logps=values.get("reference_logps"),
        rewards=values["rewards"],
        kl=values.get("kl"),
        no_kl=no_kl,
        rule="rewards of the model" if policy.named.classifies else rule_of(_args(policy), reading.beta, reference),
        scoring=choice.line,
        proved=None if reference is None else reference.proved,
        trained_on=trained is not None and trained.rows == prepared.report.fingerprint,
    )


def implicit_rewards(
    args: PreferenceConfig | None, beta: float | None, policy: Scores, reference: Scores | None, sizes: Sequence[int]
) -> Tensor:
    """Rewards of K completions as the objective that trained them has them, which training reports too.

    Args:
        args: of the run; None for the plain log-ratio.
        beta: in place of the objective's own reward: this times the log-ratio.
        policy: scores.
        reference: scores of the same; None counts as zero.
        sizes: completions of each example.
    """
    if beta is None and isinstance(args, DPOConfig):
        combination = args.combination()
        numbers = Numbers(policy, reference, combination, torch.tensor(list(sizes)), {})
        return combination.beta * numbers.reward_logratios()
    if beta is None and isinstance(args, (CPOConfig, ORPOConfig)):
        row = CONTRASTS[args.loss_type if isinstance(args, CPOConfig) else "odds_ratio"]
        shape = args.alpha if isinstance(args, CPOConfig) else 0.0
        logps = policy.mean_logps if row.per_token else policy.logps
        return _beta(args, beta) * shaped_reward(logps, shape)
    ratios = policy.logps if reference is None else policy.logps - reference.logps
    return _beta(args, beta) * ratios


def rule_of(args: PreferenceConfig | None, beta: float | None, reference: Loaded | None) -> str:
    """What the rewards are, in words."""
    against = "log-ratio to the reference" if reference is not None else "log-prob (no reference)"
    if beta is None and args is not None:
        return f"as {args.objective_name} has them, beta {_beta(args, None):g} times the {against}"
    why = "" if beta is not None else ", as no run says another"
    return f"beta {_beta(args, beta):g}{why} times the {against}"


def _beta(args: PreferenceConfig | None, beta: float | None) -> float:
    if beta is not None:
        return beta
    if isinstance(args, DPOConfig):
        return args.combination().beta
    # Where beta is 0 (policy gradients without a KL term) or there is none, the log-ratio itself.
    return float(getattr(args, "beta", BETA) or 1.0) if args is not None else BETA


def _args(loaded: Loaded) -> PreferenceConfig | None:
    return loaded.named.trained.args if loaded.named.trained is not None else None


def examples_of(rows: Dataset, named: NamedModel, reading: Reading, processing: Any = None) -> list[Example]:
    """Rows as a model reads them: by its run's options, where it has one.

    Args:
        rows: see `load_for`.
        named: whose tokenizer reads them.
        reading: how.
        processing: the tokenizer or processor, where it is loaded already.
    """
    return _examples(_prepared(rows, named, reading, processing))


def _examples(prepared: Prepared) -> list[Example]:
    return [example_from_row(prepared.dataset[place]) for place in range(len(prepared.dataset))]


def _prepared(rows: Dataset, named: NamedModel, reading: Reading, processing: Any) -> Prepared:
    args = named.trained.args if named.trained is not None else None
    options: dict[str, Any] = {"max_length": reading.max_length}
    if args is not None:
        options = {
            "max_length": reading.max_length or args.max_length,
            "truncation_mode": args.truncation_mode,
            "turns": args.turns,
            "boundary": args.prompt_boundary,
        }
    return prepare(
        rows,
        processing or load_processing(named.source),
        kind=reading.kind,
        encoder_decoder=bool(load_config(named.source).is_encoder_decoder),
        name="data",
        **options,
    )


def _layout(loaded: Loaded, examples: Sequence[Example]) -> Any:
    measures = REWARDS if loaded.named.classifies else LOG_PROBS
    with loaded.in_effect() as model:
        return choose_layout(model, examples[:_PROBE_ROWS], measures=measures)


@dataclass(frozen=True)
class _Pass:
    """Both models over batches."""

    policy: Loaded
    reference: Loaded | None
    options: dict[str, Any]
    reference_options: dict[str, Any]
    kl: bool = False

    def why_no_kl(self, examples: Sequence[Example], wanted: bool) -> str:
        """Why there is no KL, found on one row; empty where there is."""
        if not wanted or self.reference is None:
            return "not asked for" if not wanted else "there is no reference"
        try:
            replace(self, kl=True).batch(pack(examples[:1]), None, None)
        except ScoringError as error:
            return str(error)
        return ""

    def over(self, examples: Sequence[Example], reading: Reading) -> dict[str, np.ndarray]:
        """The values of all completions, in the order of the examples; batches are of like length."""
        args = _args(self.policy)
        parts: dict[str, list[np.ndarray]] = {}
        places: list[int] = []
        starts = np.concatenate([[0], np.cumsum([len(example.completion_ids) for example in examples])])
        batches = list(batched(examples, reading.max_tokens))
        for rows in each(batches, f"scoring by {self.policy.named.name}"):
            found = self.batch(pack([examples[row] for row in rows]), args, reading.beta)
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
            places += [place for row in rows for place in range(starts[row], starts[row + 1])]
        order = np.argsort(places)
        return {name: np.concatenate(values)[order] for name, values in parts.items()}

    def batch(self, batch: ScoringBatch, args: PreferenceConfig | None, beta: float | None) -> dict[str, np.ndarray]:
        """The values of one batch."""
        outputs: Any = ("hidden",) if self.kl else ()
        if self.policy.named.classifies:
            with self.policy.in_effect() as model:
                values = reward(model, _to(batch, model), **self.options)
            return _numpy({"rewards": values, "tokens": torch.bincount(batch.completion_index)})
        policy = _scores(self.policy, batch, self.options, outputs)
        found = {"logps": policy.logps, "tokens": policy.lengths}
        reference = None
        if self.reference is not None:
            reference = _scores(self.reference, batch, self.reference_options, outputs)
            found["reference_logps"] = reference.logps
            if self.kl:
                with torch.no_grad():
                    divergence = token_divergence(policy, reference)
                found["kl"] = policy.sum_by_completion(divergence.cpu()) / policy.lengths.clamp(min=1)
        found["rewards"] = implicit_rewards(args, beta, policy, reference, batch.sizes)
        return _numpy(found)


def _scores(loaded: Loaded, batch: ScoringBatch, options: dict[str, Any], outputs: Any) -> Scores:
    """Scores on the CPU, but for what a KL needs."""
    with loaded.in_effect() as model:
        scores = score(model, _to(batch, model), outputs=outputs, **options)
        # The adapter may be switched for the other model's pass: the head has to stay what it is now.
        scores = with_frozen_head(scores) if outputs else scores
    index, logps = scores.completion_index.cpu(), scores.token_logps.cpu()
    return replace(scores, completion_index=index, token_logps=logps)


def _to(batch: ScoringBatch, model: torch.nn.Module) -> ScoringBatch:
    return batch.to(next(model.parameters()).device)


def _numpy(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().double().cpu().numpy() for name, value in values.items()}


def batched(examples: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    """Numbers of examples that are computed together: of like length, the longest first.

    Args:
        examples: to be dealt out, each at least once a batch however long.
        max_tokens: of prompts once and completions together.
    """
    lengths = [len(one.prompt_ids) + sum(map(len, one.completion_ids)) for one in examples]
    batch: list[int] = []
    total = 0
    for row in sorted(range(len(examples)), key=lambda row: -lengths[row]):
        if batch and total + lengths[row] > max_tokens:
            yield batch
            batch, total = [], 0
        batch.append(row)
        total += lengths[row]
    if batch:
        yield batch
