"""From the scores of a batch of pairs or ranked lists to their losses and what is reported of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tether.objectives.combination import Combination
from tether.objectives.losses.transforms import divergence_scores, length_desensitised, likelihood_weights
from tether.objectives.metrics import preference_metrics
from tether.objectives.objective import Input, Objective
from tether.types import LossOutput, LossTerm, PerCompletion, PerExample, PerToken, Scores


def preference_loss(
    policy: Scores,
    reference: Scores | None,
    *,
    loss: str | Combination,
    values: Mapping[str, PerExample] | None = None,
    sizes: Sequence[int] | None = None,
    divergence: PerToken | None = None,
    **options: float,
) -> LossOutput:
    """Losses of a batch of pairs or ranked lists, with TRL's metrics.

    Args:
        policy: scores of K completions, those of an example in a row: chosen and rejected in turn, or the best of a
            list first; `entropy`, `top1` and `mean_logits` are reported where they are there.
        reference: scores of the same completions under the reference; None: a flat one, whose log-probs are 0.
        loss: a name in the table of objectives, or several with weights and transforms.
        values: `[B]` each: `weight` multiplies the loss of an example, `margin` goes to the losses that take margins.
        sizes: completions of each example, for ranked lists; None: 2 each.
        divergence: `[N]` nats, KL(reference, policy) of the distribution that each token is from, for the losses that
            take it; see `tether.scoring.divergence`.
        options: the objective's own, such as `beta`, for a loss that is given by name.

    Returns:
        A term over examples `[B]`, one over tokens where a loss is averaged over them, and the metrics.

    Raises:
        ValueError: a loss needs margins and there is no such column; or WPO weights were asked for and the policy was
            scored without `log_collision`.
    """
    combination = loss if isinstance(loss, Combination) else Combination((loss,), options=options)
    device = policy.token_logps.device
    pairs = [2] * (policy.num_completions // 2)
    counts = torch.tensor(pairs if sizes is None else list(sizes), device=device)
    numbers = Numbers(policy, reference, combination, counts, values or {}, divergence)
    example = policy.token_logps.new_zeros(len(counts), dtype=numbers.logps.dtype)
    tokens: Tensor | None = None
    for row, weight in combination.weighted():
        losses = weight * numbers.losses(row, combination.options_of(row))
        if row.averaged == "tokens":
            tokens = losses if tokens is None else tokens + losses
        else:
            example = example + losses
    scale = numbers.scale()
    if scale is not None:
        example = scale * example
        tokens = None if tokens is None else scale[numbers.chosen_tokens_example] * tokens
    slopes = None
    if example.requires_grad:
        # By the log-probs, a number for each completion: the model is not differentiated here.
        (slopes,) = torch.autograd.grad(example.sum(), numbers.logps, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        rewards = combination.beta * numbers.reward_logratios()
        metrics = preference_metrics(policy, reference, numbers.logps.detach(), rewards, slopes, counts)
    terms = (LossTerm(example), *([] if tokens is None else [LossTerm(tokens, "tokens")]))
    return LossOutput(terms, metrics)


class Numbers:
    """The numbers that losses take, see `tether.objectives.Input`; each is made when a loss asks for it.

    Of one side of a pair it is `[B]`, of each completion of lists of one size `[B, K]`.
    """

    def __init__(
        self,
        policy: Scores,
        reference: Scores | None,
        combination: Combination,
        sizes: Int[Tensor, " B"],
        values: Mapping[str, PerExample],
        divergence: PerToken | None = None,
    ) -> None:
        self._divergence = divergence
        self._policy, self._combination, self._sizes, self._values = policy, combination, sizes, values
        self.logps = self._summed(policy)
        self._reference_logps = torch.zeros_like(self.logps) if reference is None else self._summed(reference)

    def _summed(self, scores: Scores) -> PerCompletion:
        alpha = self._combination.ld_alpha
        return scores.logps if alpha is None else length_desensitised(scores, self._sizes, alpha)

    def losses(self, row: Objective, options: Mapping[str, float]) -> Float[Tensor, " V"]:
        """Losses of one row of the table: one per example, or per token where the row says so."""
        if row.kind == "pair":
            return row.function(*(self.of_pairs(one, row) for one in row.inputs), **options)
        # Lists of one length at a time: a row of a tensor each, without padding.
        losses = self.logps.new_zeros(len(self._sizes))
        starts = self._sizes.cumsum(0) - self._sizes
        for size in self._sizes.unique().tolist():
            (lists,) = torch.nonzero(self._sizes == size, as_tuple=True)
            completions = starts[lists][:, None] + torch.arange(size, device=starts.device)
            given = [self._each(one)[completions] for one in row.inputs]
            losses = losses.index_add(0, lists, row.function(*given, **options))
        return losses

    def of_pairs(self, wanted: Input, row: Objective) -> Float[Tensor, " V"] | None:
        """A number of each pair, `[B]`; None for margins that are not there and need not be."""
        if wanted.quantity == "margins":
            if "margin" not in self._values and not wanted.optional:
                raise ValueError(f"Loss {row.name!r} needs the margin of each pair; add a column `margin` to the rows.")
            return self._values.get("margin")
        first = 1 if wanted.of == "rejected" else 0
        if wanted.quantity == "token_logps":
            return self._policy.token_logps[self._policy.completion_index % 2 == first]
        return self._each(wanted)[first::2]

    def _each(self, wanted: Input) -> PerCompletion:
        """A number of each completion, `[K]`."""
        found = self._whole(wanted)
        return found / self._policy.lengths.clamp(min=1) if wanted.per_token else found

    def _whole(self, wanted: Input) -> PerCompletion:
        if wanted.quantity == "logps":
            return self.logps
        if wanted.quantity == "reference_logps":
            return self._reference_logps
        if wanted.quantity == "reference_kl" and self._divergence is not None:
            return self._policy.sum_by_completion(self._divergence)
        if wanted.quantity != "logratios":
            raise ValueError(f"A loss takes {wanted.name!r}, which a batch of pairs or lists does not have.")
        coefficient = self._combination.f_alpha_divergence_coef
        kind = self._combination.f_divergence_type
        return divergence_scores(self.logps - self._reference_logps, kind, 0.5 if coefficient is None else coefficient)

    def reward_logratios(self) -> PerCompletion:
        """What rewards are reported of: log-ratios, per token where the objective's own reward is a mean log-prob."""
        logratios = (self.logps - self._reference_logps).detach()
        row = self._combination.rows[0]
        own = not row.needs_reference and row.per_token
        return logratios / self._policy.lengths.clamp(min=1) if own else logratios

    def scale(self) -> PerExample | None:
        """What the loss of each example is multiplied by, `[B]`: the column `weight` and WPO's weights; None: 1."""
        factors = [self._values["weight"]] if "weight" in self._values else []
        if self._combination.use_weighting:
            weights = likelihood_weights(self._policy)
            factors.append(weights[0::2] * weights[1::2])
        return torch.stack(factors).prod(0) if factors else None

    @property
    def chosen_tokens_example(self) -> Int[Tensor, " M"]:
        """Which pair each token of a chosen completion belongs to: int64 `[M]`."""
        index = self._policy.completion_index
        return index[index % 2 == 0] // 2
