"""From prompts to what is trained on: sampled, kept, judged, scored where that must be done now, with advantages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from tether.errors import RewardError, RolloutError
from tether.objectives.online.advantages import spread, weighted_sum, without_variance
from tether.rewards import Calling, Judged, Reward, RewardTable, call_rewards
from tether.rollout import Completion, Group, ReplayEngine, RolloutEngine, RolloutRequest, Sampling
from tether.rollout.files import forget_later, rollout_file, write_rollout
from tether.rollout.proof import choose_engine
from tether.scoring import pack
from tether.scoring.batch import with_token_values
from tether.training.algorithms.base import Passes
from tether.training.online.groups import (
    Metrics,
    Wanted,
    divergence,
    example_of,
    judge_by,
    lengths_of,
    mass_of,
    pairs_of,
    with_values,
)
from tether.training.online.reward_gain import Progress, group_means
from tether.training.online.serving import Served, Serving
from tether.training.online.table import Completions
from tether.types import Example

logger = logging.getLogger("tether")
# From rewards by function [K, R], their weights [R] and the KL of each completion [K] (None: none) to advantages [K].
Advantages = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


@dataclass(frozen=True)
class Plan:
    """What is done with sampled completions, from a trainer's configuration.

    Args:
        sampling: how they are drawn.
        engine: which embedded engine, see `choose_engine`.
        rewards: the reward functions.
        calling: how they are called.
        advantages: makes them of rewards.
        proximal: the policy is scored when a rollout begins, as it moves before the rollout is used up, or because the
            engine's log-probs are corrected for.
        correct: the engine's log-probs are kept where it does not compute with the policy's weights, or draws with a
            penalty.
        reference: the reference is scored.
        kl_in_reward: the KL of each completion is a part of its reward.
        leave_truncated: completions that were cut off are left out.
        leave_without_variance: completions of groups in which all rewards are equal are left out.
        folder: where rollouts are kept; None: nowhere.
        table: completions of the last rollout are held for the table.
        serving: the server, where the engine is one.
        resample_rounds: how often groups whose rewards are all equal are replaced by other prompts.
        wide_head: see `tether.scoring.score`.
        pairs: of each group the best and the worst completion are trained on, as a pair.
        apart: rewards of different functions are normalised before they are summed.
    """

    sampling: Sampling
    engine: str
    rewards: tuple[Reward, ...]
    calling: Calling
    advantages: Advantages
    proximal: bool = False
    correct: bool = True
    reference: bool = False
    kl_in_reward: bool = False
    leave_truncated: bool = False
    leave_without_variance: bool = False
    folder: Path | None = None
    table: bool = False
    pairs: bool = False
    wide_head: bool = False
    serving: Serving | None = None
    resample_rounds: int = 0
    apart: bool = False

    @property
    def weights(self) -> Tensor:
        """`[R]`; a `rollout_func` that returns the rewards itself has one."""
        return torch.tensor([reward.weight for reward in self.rewards] or [1.0])

    def equal(self, rewards: Tensor, group: int) -> Tensor:
        """Bool `[K]` of `[K, R]`: in the completion's group all rewards are equal, so that it teaches nothing.

        Functions that are normalised each by itself must each give one number: sums may be equal where these are not.
        """
        if not self.apart:
            return without_variance(weighted_sum(rewards, self.weights), group)
        counted = rewards[:, self.weights != 0].T
        return torch.stack([without_variance(values, group) for values in counted]).all(0)


@dataclass(frozen=True)
class Sample:
    """What was sampled for this process, and what its rewards are.

    Args:
        groups: with K completions.
        texts: K.
        judged: what reward functions saw.
        table: what they said.
        engine: that sampled.
        seconds: that it took.
        figures: of what came before, for the log.
    """

    groups: list[Group]
    texts: list[str]
    judged: Judged
    table: RewardTable
    engine: RolloutEngine
    seconds: float
    figures: Metrics = field(default_factory=dict)

    @property
    def completions(self) -> list[Completion]:
        """K, in order."""
        return [one for group in self.groups for one in group.completions]

    def replaced(self, places: Sequence[int], new: Sample, judge: Any, conversational: bool) -> Sample:
        """With other groups at some places.

        Args:
            places: numbers of groups.
            new: what stands there.
            judge: makes `Judged` of groups and texts.
            conversational: see `Wanted`.
        """
        starts = [0]
        for group in self.groups:
            starts.append(starts[-1] + len(group.completions))
        rows = [row for place in places for row in range(starts[place], starts[place + 1])]
        groups, texts, values = list(self.groups), list(self.texts), self.table.values.clone()
        for place, group in zip(places, new.groups, strict=True):
            groups[place] = group
        for row, text in zip(rows, new.texts, strict=True):
            texts[row] = text
        values[rows] = new.table.values
        extras: dict[str, list[Any]] = {}
        for name in {**self.table.extras, **new.table.extras}:
            extras[name] = list(self.table.extras.get(name, [None] * len(texts)))
            for row, value in zip(rows, new.table.extras.get(name, [None] * len(rows)), strict=True):
                extras[name][row] = value
        metrics = {
            name: [*self.table.metrics.get(name, []), *new.table.metrics.get(name, [])]
            for name in {**self.table.metrics, **new.table.metrics}
        }
        seconds = tuple(a + b for a, b in zip_longest(self.table.seconds, new.table.seconds, fillvalue=0.0))
        failed = tuple(a + b for a, b in zip_longest(self.table.failed, new.table.failed, fillvalue=0))
        table = RewardTable(values, seconds, failed, metrics, extras)
        judged = judge(groups, texts, conversational)
        return Sample(groups, texts, judged, table, self.engine, self.seconds + new.seconds, self.figures)


class Keeper:
    """Writes a rollout's file: completions before rewards run, and once more with them; also those that are replaced.

    Args:
        path: of the file; None: nothing is kept.
        plan: rewards and sampling.
    """

    def __init__(self, path: Path | None, plan: Plan) -> None:
        self.path, self._plan = path, plan
        self._groups: list[Group] = []
        self._texts: list[str] = []
        self._rewards: list[dict[str, float | None]] = []
        self._engine = ""

    def add(self, groups: Sequence[Group], texts: Sequence[str], engine: str) -> None:
        """Keep completions whose rewards are not known yet."""
        self._groups += groups
        self._texts += texts
        self._engine = engine
        self._write()

    def judged(self, table: RewardTable) -> None:
        """Keep the rewards of what was added last."""
        names = [one.name for one in self._plan.rewards]
        for row in table.values.tolist():
            self._rewards.append(
                {name: _or_none(value) for name, value in zip(names, row, strict=True)} if names else {}
            )
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        missing: list[dict[str, float | None]] = [{}] * (len(self._texts) - len(self._rewards))
        write_rollout(
            self.path,
            self._groups,
            self._texts,
            rewards=[*self._rewards, *missing],
            engine=self._engine,
            sampling=self._plan.sampling,
            weights={one.name: one.weight for one in self._plan.rewards},
        )


@dataclass
class Experience:
    """Makes what is trained on.

    Args:
        plan: what is done.
        decode: token ids to text.
        engine: what samples; None: an embedded engine, chosen and proved at the first rollout.
    """

    plan: Plan
    decode: Callable[[list[int]], str]
    engine: RolloutEngine | None = None
    passes: Passes | None = None
    pending: list[Metrics] = field(default_factory=list)
    evaluated: list[Metrics] = field(default_factory=list)
    evaluated_groups: list[Tensor] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    last: Completions | None = None
    served: Served | None = None
    kept: bool = False  # a rollout of this run is on disk
    _before: ReplayEngine | None = None

    @property
    def figures(self) -> list[str]:
        """Names of what is said of an evaluation's rollouts."""
        each = [f"rewards/{one.name}/mean" for one in self.plan.rewards]
        whole = ("reward", "reward_error", "reward_std", "frac_reward_zero_std")
        return [*each, *whole, *lengths_of(torch.ones(1), torch.zeros(1) > 0)]

    def sample(self, wanted: Wanted) -> Sample:
        """Completions, kept on disk before rewards run, and their rewards.

        Raises:
            RolloutError: no engine samples from what the trainer scores.
            RewardError: a reward function failed; the completions are on disk.
        """
        requests = [one for batch in wanted.requests for one in batch]
        self._before = self._kept_before(wanted, self._engine(requests))
        figures = {} if self.served is None else self.served.bring()
        kept = self._keeper(wanted)
        found = replace(self._sampled(wanted, requests, kept), figures=figures)
        rounds = 0 if wanted.number == "eval" else self.plan.resample_rounds
        return found if not rounds else self._with_variance(wanted, found, kept, rounds)

    def _sampled(self, wanted: Wanted, requests: Sequence[RolloutRequest], kept: Keeper) -> Sample:
        engine, begun = self._engine(requests), time.perf_counter()
        passes = self._passes()
        groups = passes.together(lambda: self._drawn(engine, requests), "Sampling", RolloutError)
        seconds = time.perf_counter() - begun
        texts = [self.decode(one.ids.tolist()) for group in groups for one in group.completions]
        kept.add(groups, texts, engine.name)
        judged = judge_by(groups, texts, wanted.conversational)
        try:
            table = self._call(judged)
        except RewardError as error:
            where = "" if kept.path is None else f" The completions are kept in {kept.path}."
            raise RewardError(f"{error}{where}") from error
        kept.judged(table)
        return Sample(groups, texts, judged, table, engine, seconds)

    def _kept_before(self, wanted: Wanted, engine: RolloutEngine) -> ReplayEngine | None:
        """What an engine that may not draw the same again had drawn before the run ended."""
        plan, number = self.plan, wanted.number
        if not wanted.again or engine.embedded or isinstance(engine, ReplayEngine) or not isinstance(number, int):
            return None
        process = self._passes().accelerator.process_index
        if plan.folder is None or not rollout_file(plan.folder, number, process).is_file():
            return None
        found = ReplayEngine(plan.folder)
        return found if found.has(number, plan.sampling) else None

    def _drawn(self, engine: RolloutEngine, requests: Sequence[RolloutRequest]) -> list[Group]:
        policy, sampling = self._passes().model(), self.plan.sampling
        if self._before is not None:
            try:
                found = self._before.generate(policy, requests, sampling)
            except RolloutError:  # not all of them, or after other ids
                return engine.generate(policy, requests, sampling)
            logger.info(
                f"rollouts: {len(requests)} prompts have the completions that were sampled before the run ended"
            )
            return found
        return engine.generate(policy, requests, sampling)

    def _with_variance(self, wanted: Wanted, sample: Sample, kept: Keeper, rounds: int) -> Sample:
        """Groups whose rewards are all equal, replaced by those of further prompts.

        Which prompts come is a function of seed and rollout alone, so that a resumed run has the same.
        """
        at = len(sample.completions) * self._passes().accelerator.process_index
        owners = []
        for group in sample.groups:
            owners.append(at // wanted.group)
            at += len(group.completions)
        used = 0
        for _ in range(rounds):
            equal = self.plan.equal(self._gathered(sample.table.values), wanted.group)
            equal = equal.view(-1, wanted.group)[:, 0].nonzero()[:, 0].tolist()
            further = dict(zip(equal, wanted.further(used, len(equal)), strict=False))
            if not further:
                break
            used += len(further)
            places = [place for place, owner in enumerate(owners) if owner in further]
            requests = [
                replace(further[owners[place]], branches=sample.groups[place].request.branches) for place in places
            ]
            new = self._sampled(wanted, requests, kept)
            sample = sample.replaced(places, new, judge_by, wanted.conversational)
        return replace(sample, figures={**sample.figures, "groups/resampled": float(used)})

    def make(self, wanted: Wanted) -> list[list[Example]]:
        """The examples of each batch, with their advantages, weights, and log-probs that are constant.

        Raises:
            RolloutError, RewardError: see `sample`.
        """
        sample, plan = self.sample(wanted), self.plan
        facts = torch.tensor([[mass_of(one), one.length, one.finish == "length"] for one in sample.completions])
        whole = self._gathered(torch.cat([sample.table.values, facts], 1))
        rewards, masses, truncated = whole[:, :-3], whole[:, -3], whole[:, -1] > 0
        weights = plan.weights
        total = weighted_sum(rewards, weights)
        # Of what the policy wrote nothing of there is nothing to train on.
        kept = self._kept(rewards, truncated, wanted.group) & (whole[:, -2] > 0)
        first = len(facts) * self._passes().accelerator.process_index
        mine = slice(first, first + len(facts))
        if plan.pairs:
            batches = [self._scored(batch) for batch in pairs_of(wanted, sample.groups, total[mine], kept[mine])]
            advantages = plan.advantages(rewards, weights, None, wanted.group)
            kept = kept & ~without_variance(total.masked_fill(~kept, torch.nan), wanted.group)
        else:
            batches = self._batches(wanted, sample.groups, kept[mine], sample.engine)
            batches = [self._scored(batch) for batch in batches]
            kl = self._gathered(torch.cat([divergence(batch) for batch in batches])) if plan.kl_in_reward else None
            advantages = plan.advantages(rewards, weights, kl, wanted.group)
            values = iter(torch.stack([advantages, kept.float()], 1)[mine].split(1))
            batches = [[with_values(one, values) for one in batch] for batch in batches]
        metrics = {
            **self._reward_metrics(rewards, total, kept, sample.table, wanted.group),
            **lengths_of(whole[:, -2], truncated),
        }
        if not masses.isnan().all():
            metrics["sampling/kept_mass"] = masses.nanmean().item()
        tokens = float(facts[:, 1].sum())
        metrics |= {**sample.figures, "rollout/seconds": sample.seconds}
        metrics |= {"rollout/tokens_per_second": tokens / max(sample.seconds, 1e-9)}
        if wanted.number == "eval":
            self.evaluated.append(metrics)
            self.evaluated_groups.append(group_means(total, wanted.group))
        else:
            self.pending.append(metrics)
            self.progress.add(total, wanted.group)
            self._hold(sample.judged, sample.table, rewards, advantages, wanted.group)
        return batches

    def _hold(self, judged: Judged, table: RewardTable, rewards: Tensor, advantages: Tensor, group: int) -> None:
        """Keep what the table of completions shows; each process has to call."""
        if not self.plan.table:
            return
        names = [one.name for one in self.plan.rewards] or [GIVEN]
        # Objects of all processes come in the order of the gathered rewards.
        extras = sorted({name for part in gather_object([sorted(table.extras)]) for name in part})
        missing = [None] * len(judged.prompts)
        self.last = Completions(
            gather_object(list(judged.prompts)),
            gather_object(list(judged.completions)),
            {name: [_or_none(one) for one in rewards[:, place].tolist()] for place, name in enumerate(names)},
            advantages.tolist(),
            {name: gather_object(list(table.extras.get(name, missing))) for name in extras},
            group,
        )

    def _passes(self) -> Passes:
        assert self.passes is not None, "attach() comes first"
        return self.passes

    def _gathered(self, values: Tensor) -> Tensor:
        """Of all processes, on the CPU."""
        passes = self._passes()
        if passes.accelerator.num_processes == 1:
            return values.cpu()
        return passes.gather(values.to(passes.accelerator.device)).cpu()

    def _engine(self, requests: Sequence[RolloutRequest]) -> RolloutEngine:
        if self.engine is None and self.plan.serving is not None:
            self.served = Served(self.plan.serving, self._passes(), requests, self.plan.sampling)
            self.engine = self.served.engine
        if self.engine is None:
            passes = self._passes()
            self.engine = choose_engine(
                self.plan.engine,
                passes.model(),
                lambda batch: passes.policy(batch).token_logps,
                sorted(requests, key=lambda one: one.images is None),
                self.plan.sampling,
                lambda: passes.accelerator.autocast(),
                wide_head=self.plan.wide_head,
                everywhere=passes.everywhere,
            )
        return self.engine

    def _keeper(self, wanted: Wanted) -> Keeper:
        """Evaluations are not kept."""
        plan, number = self.plan, wanted.number
        if plan.folder is None or not isinstance(number, int):
            return Keeper(None, plan)
        process = self._passes().accelerator.process_index
        if not self.kept:
            forget_later(plan.folder, number, process, self._passes().accelerator.num_processes)
            self.kept = True
        return Keeper(rollout_file(plan.folder, number, process), plan)

    def _call(self, judged: Judged) -> RewardTable:
        """The rewards; an error of one process reaches all."""
        passes = self._passes()

        def called() -> RewardTable:
            if not len(judged):  # of this process nothing is sampled again
                return RewardTable(torch.empty(0, max(1, len(self.plan.rewards))), (), ())
            if GIVEN not in judged.columns and not self.plan.rewards:
                raise RewardError(
                    f"rollout_func returned no {GIVEN!r}, and there are no reward_funcs. Return one for each "
                    "completion, or give reward_funcs."
                )
            rewards = self.plan.rewards or (Reward(lambda rewards: rewards, GIVEN),)
            table = call_rewards(rewards, judged, state=passes.state(), calling=self.plan.calling)
            taken = next((name for name in table.metrics if name in _taken(rewards)), None)
            if taken is not None:
                raise RewardError(f"log_metric({taken!r}) is the name of a figure of the run. Log it under another.")
            return table

        return passes.together(called, "A reward function", RewardError)

    def _kept(self, rewards: Tensor, truncated: Tensor, group: int) -> Tensor:
        """Bool `[K]`: which completions are trained on."""
        kept = torch.ones(len(rewards), dtype=torch.bool)
        if self.plan.leave_truncated:
            kept &= ~truncated
        if self.plan.leave_without_variance:
            kept &= ~self.plan.equal(rewards, group)
        return kept

    def _batches(self, wanted: Wanted, groups: list[Group], kept: Tensor, engine: RolloutEngine) -> list[list[Example]]:
        """The examples of each batch; what is left out is a single token, which costs nothing and still counts."""
        rest, keep = iter(groups), iter(kept.tolist())
        found = []
        for batch in wanted.requests:
            examples = []
            for _ in batch:
                group = next(rest)
                example = example_of(group, [next(keep) for _ in group.completions])
                reported = [one.logps for one in group.completions]
                apart = not engine.embedded or self.plan.sampling.penalises
                if self.plan.correct and apart and all(logps is not None for logps in reported):
                    pairs = zip(example.completion_ids, reported, strict=True)
                    logps = tuple(logps[: len(ids)] for ids, logps in pairs if logps is not None)
                    example = replace(example, token_values={"rollout": logps})
                examples.append(example)
            found.append(examples)
        return found

    def _scored(self, batch: list[Example]) -> list[Example]:
        """With log-probs by the policy and the reference as they are now, of the micro-batches that steps will make."""
        passes, plan = self._passes(), self.plan
        proximal = plan.proximal or plan.kl_in_reward or any("rollout" in one.token_values for one in batch)
        if not proximal and not plan.reference:
            return batch
        device, found = passes.accelerator.device, {}
        for part in passes.split(pack(batch)):
            moved = part.batch.to(device)
            # The reference first, as in a step: a snapshot exchanges weights.
            reference = passes.reference(moved) if plan.reference else None
            values: dict[str, Tensor] = {} if reference is None else {"reference": reference.token_logps}
            if proximal:
                values["proximal"] = passes.policy(moved).token_logps
            if part.counts:
                new = with_token_values(part.batch, values)
                found.update({id(old): one for old, one in zip(part.batch.examples, new, strict=True)})
        return [found[id(one)] for one in batch]

    def _reward_metrics(self, rewards: Tensor, total: Tensor, kept: Tensor, table: RewardTable, group: int) -> Metrics:
        names = [one.name for one in self.plan.rewards] or [GIVEN]
        found: Metrics = {}
        for place, name in enumerate(names):
            values = rewards[:, place]
            found |= {f"rewards/{name}/mean": values.nanmean().item(), f"rewards/{name}/std": spread(values).item()}
            found[f"rewards/{name}/not_applicable"] = values.isnan().float().mean().item()
            found[f"rewards/{name}/seconds"] = table.seconds[place]
        found |= {name: torch.tensor(values).nanmean().item() for name, values in table.metrics.items()}
        found |= {"reward": total.nanmean().item(), "reward_std": spread(total).item()}
        found["frac_reward_zero_std"] = self.plan.equal(rewards, group).float().mean().item()
        found["advantages/left_out"] = 1 - kept.float().mean().item()
        return found


# What a `rollout_func` calls the rewards that it returns itself.
GIVEN = "rewards"
# What every training log has, besides the figures of rewards and lengths.
_LOGGED = {
    *("loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens", "step_time", "kl", "entropy"),
    *("entropy_coef", "policy_loss", "aux_loss", "reward", "reward_std", "frac_reward_zero_std"),
}


def _taken(rewards: Sequence[Reward]) -> set[str]:
    """Names that a reward function cannot log under, as the run's own figures have them."""
    parts = ("mean", "std", "not_applicable", "seconds")
    each = {f"rewards/{one.name}/{part}" for one in rewards for part in parts}
    return _LOGGED | each | lengths_of(torch.ones(1), torch.zeros(1) > 0).keys()


def _or_none(value: float) -> float | None:
    return None if value != value else value


def means_of(metrics: Sequence[Mapping[str, float]], device: torch.device | str) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts over rollouts, of what is a number."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for one in metrics:
        for name, value in one.items():
            if value == value:
                pair = torch.tensor(value, dtype=torch.float64, device=device), torch.ones((), device=device)
                held = found.get(name)
                found[name] = pair if held is None else (held[0] + pair[0], held[1] + pair[1])
    return found
