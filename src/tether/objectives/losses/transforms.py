"""What is done to numbers before a loss: f-divergences, desensitising to length, weights of how likely a pair is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tether.types import PerCompletion, Scores

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# exp(40) is 2e17: its square, which `ipo` needs, is still a float32.
EXPONENT_LIMIT = 40.0


def divergence_scores(
    logratios: Float[Tensor, "*shape"], f_divergence_type: str, f_alpha_divergence_coef: float = 0.5
) -> Float[Tensor, "*shape"]:
    """`f'(policy / reference)`, which takes the place of the log-ratio under another divergence than the reverse KL.

    | divergence | f' of the ratio u |
    |---|---|
    | `reverse_kl` | `log u` |
    | `forward_kl` | `1 - 1 / u` |
    | `js_divergence` | `log(2 u / (1 + u))` |
    | `alpha_divergence` | `(u^(a - 1) - 1) / (a - 1)`; `log u` at a = 1 |

    Args:
        logratios: any shape, nats.
        f_divergence_type: one of the above.
        f_alpha_divergence_coef: a, for `alpha_divergence`.

    Returns:
        The same shape. Exponents are clipped at 40, where gradients end.

    Reference:
        Wang et al., Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
        Constraints, table 1, arXiv:2309.16240; alpha-divergence and its sign as in TRL 1.16.

    Example:
        >>> divergence_scores(torch.tensor([0.0, 1.0]), "js_divergence")
        tensor([0.0000, 0.3799])
    """
    if f_divergence_type == "forward_kl":
        return -torch.expm1((-logratios).clamp(max=EXPONENT_LIMIT))
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    power = f_alpha_divergence_coef - 1
    if f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
        return torch.expm1((power * logratios).clamp(max=EXPONENT_LIMIT)) / power
    return logratios


def length_desensitised(scores: Scores, sizes: Int[Tensor, " B"], ld_alpha: float) -> PerCompletion:
    """Log-probability of each completion with what exceeds the shortest of its example weighted by `ld_alpha`: `[K]`.

    Args:
        scores: of K completions, numbered in the order of the examples.
        sizes: int64 `[B]`, completions of each example.
        ld_alpha: weight of the tokens after the shared length; 1 leaves them as they are, 0 leaves them out.

    Reference:
        Liu et al., Length Desensitization in Direct Preference Optimization, arXiv:2409.06411.

    Example:
        >>> scores = Scores(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 1]), 2)
        >>> length_desensitised(scores, torch.tensor([2]), 0.5)
        tensor([-2., -4.])
    """
    lengths, index = scores.lengths, scores.completion_index
    example = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    shared = lengths.new_full((len(sizes),), torch.iinfo(lengths.dtype).max)
    shared = shared.scatter_reduce(0, example, lengths, "amin")[example]
    position = torch.arange(len(index), device=index.device) - (lengths.cumsum(0) - lengths)[index]
    weights = torch.where(position < shared[index], 1.0, ld_alpha)
    return scores.sum_by_completion(weights * scores.token_logps)


def likelihood_weights(policy: Scores) -> PerCompletion:
    """WPO's weight of each completion, `exp(mean_t log p_t - log sum_v p_v^2)`: `[K]`, without gradient.

    How likely the policy itself would have written it, against what it would write on average.

    Args:
        policy: scores with `log_collision`.

    Reference:
        Zhou et al., WPO: Enhancing RLHF with Weighted Preference Optimization, eq. 2 with the weights aligned for
        sampled output (section 3.2), arXiv:2406.11827.
    """
    if policy.log_collision is None:
        raise ValueError('WPO weights need the policy\'s log_collision; score with outputs=("log_collision",).')
    aligned = policy.sum_by_completion((policy.token_logps - policy.log_collision).detach())
    return (aligned / policy.lengths.clamp(min=1)).exp()
