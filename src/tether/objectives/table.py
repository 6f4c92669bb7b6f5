"""The one table of objectives: the command line, the documentation, the error messages and the tests read it.

What the columns are is said in `tether.objectives.row.Objective`; formulae and papers are with the functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from tether.objectives import anchored, pairwise, ranked, reference_free
from tether.objectives.row import POSITIVE, PROBABILITY, Objective, Range

_SUMMED = "log-probs summed over completion tokens; beta per nat"
# Where training usually begins, for LoRA and for full fine-tuning: the papers' recipes and common practice.
_AS_DPO = ("5e-6 to 5e-5", "3e-7 to 1e-6")

OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective(
            name="sigmoid",
            function=pairwise.sigmoid,
            kind="pair",
            options={"beta": POSITIVE, "label_smoothing": PROBABILITY},
            convention=f"{_SUMMED}; label_smoothing is the chance of a wrong label",
            when="The default: start here. Takes label_smoothing for noisy labels and a column margin.",
            learning_rate=_AS_DPO,
            f_divergence=True,
        ),
        Objective(
            name="sigmoid_norm",
            function=pairwise.sigmoid_norm,
            kind="pair",
            options={"beta": POSITIVE, "label_smoothing": PROBABILITY},
            convention="log-ratios averaged over completion tokens; beta per nat per token",
            when="When DPO makes completions longer; the length of a completion no longer counts.",
            learning_rate=_AS_DPO,
            f_divergence=True,
        ),
        Objective(
            name="hinge",
            function=pairwise.hinge,
            kind="pair",
            options={"beta": POSITIVE},
            convention=_SUMMED,
            when="When pairs that are well apart should no longer pull.",
            learning_rate=_AS_DPO,
            f_divergence=True,
        ),
        Objective(
            name="ipo",
            function=pairwise.ipo,
            kind="pair",
            options={"beta": POSITIVE},
            convention="log-ratios averaged over completion tokens; beta is the paper's tau",
            when="When DPO overfits labels that are nearly always the same; it aims at a fixed lead.",
            learning_rate=_AS_DPO,
            f_divergence=True,
        ),
        Objective(
            name="exo_pair",
            function=pairwise.exo_pair,
            kind="pair",
            options={"beta": POSITIVE, "label_smoothing": Range(0, 0.5, low_included=False)},
            convention=f"{_SUMMED}; label_smoothing is the paper's epsilon",
            when="When the policy should seek the mode of the preferences instead of covering them.",
            learning_rate=_AS_DPO,
            f_divergence=True,
        ),
        Objective(
            name="robust",
            function=pairwise.robust,
            kind="pair",
            options={"beta": POSITIVE, "label_smoothing": PROBABILITY},
            convention=f"{_SUMMED}; label_smoothing is the known rate of flipped labels",
            when="When labels are flipped at a rate that you know.",
            learning_rate=_AS_DPO,
            f_divergence=True,
        ),
        Objective(
            name="discopop",
            function=pairwise.discopop,
            kind="pair",
            options={"beta": POSITIVE, "discopop_tau": POSITIVE},
            convention=f"{_SUMMED}; discopop_tau is the temperature of the blend",
            when="To try a loss that was found by search; it is not convex.",
            learning_rate=_AS_DPO,
            f_divergence=True,
        ),
        Objective(
            name="dpop",
            function=pairwise.dpop,
            kind="pair",
            options={"beta": POSITIVE, "dpop_lambda": Range(0)},
            convention=f"{_SUMMED}; dpop_lambda weighs nats that the chosen one lost",
            when="When chosen and rejected differ by a few tokens and DPO makes both less likely.",
            learning_rate=_AS_DPO,
        ),
        Objective(
            name="rpo",
            function=pairwise.rpo,
            kind="pair",
            options={"beta": POSITIVE, "rpo_eta": POSITIVE},
            convention=f"{_SUMMED}; rpo_eta times the column margin is the gap aimed at",
            when="When a reward model or judge gave scores: the column margin has their difference.",
            learning_rate=_AS_DPO,
            f_divergence=True,
        ),
        Objective(
            name="tdpo1",
            function=pairwise.tdpo1,
            kind="pair",
            options={"beta": POSITIVE},
            convention=f"{_SUMMED}; KL(reference, policy) of whole distributions, summed over tokens",
            when="To balance the KL of chosen and rejected; costs two projections by each head per token.",
            learning_rate=_AS_DPO,
        ),
        Objective(
            name="tdpo2",
            function=pairwise.tdpo2,
            kind="pair",
            options={"beta": POSITIVE, "tdpo_alpha": POSITIVE},
            convention=f"{_SUMMED}; KL(reference, policy) of whole distributions, summed over tokens",
            when="As tdpo1, with the balance weighed by tdpo_alpha; the paper's preferred one.",
            learning_rate=_AS_DPO,
        ),
        Objective(
            name="aot",
            function=pairwise.aot,
            kind="pair",
            options={"beta": POSITIVE, "label_smoothing": PROBABILITY},
            convention="margins of policy and reference, each sorted over the micro-batch; beta per nat",
            when="When margins should grow as a whole rather than pair by pair; use large micro-batches.",
            learning_rate=_AS_DPO,
            averaged="micro_batch",
        ),
        Objective(
            name="aot_unpaired",
            function=pairwise.aot_unpaired,
            kind="pair",
            options={"beta": POSITIVE, "label_smoothing": PROBABILITY},
            convention="log-ratios of chosen and of rejected, each sorted over the micro-batch; beta per nat",
            when="When chosen and rejected do not belong together in pairs; use large micro-batches.",
            learning_rate=_AS_DPO,
            averaged="micro_batch",
        ),
        Objective(
            name="nca_pair",
            function=anchored.nca_pair,
            kind="pair",
            options={"beta": POSITIVE},
            convention=_SUMMED,
            when="When the chosen completion must not become less likely, as under DPO it often does.",
            learning_rate=_AS_DPO,
        ),
        Objective(
            name="bco_pair",
            function=anchored.bco_pair,
            kind="pair",
            options={"beta": POSITIVE},
            convention=f"{_SUMMED}; no shift",
            when="When each label is reliable on its own: chosen is good, rejected is bad.",
            learning_rate=_AS_DPO,
        ),
        Objective(
            name="sppo_hard",
            function=anchored.sppo_hard,
            kind="pair",
            options={"beta": POSITIVE},
            convention="log-probs summed over completion tokens; beta is 1 / eta, aimed at are 1 / (2 beta) nats",
            when="For rounds of self-play, with a fresh reference and fresh completions each round.",
            learning_rate=_AS_DPO,
        ),
        Objective(
            name="apo_zero",
            function=anchored.apo_zero,
            kind="pair",
            options={"beta": POSITIVE},
            convention=_SUMMED,
            when="When the chosen completions are better than what the policy writes.",
            learning_rate=_AS_DPO,
        ),
        Objective(
            name="apo_down",
            function=anchored.apo_down,
            kind="pair",
            options={"beta": POSITIVE},
            convention=_SUMMED,
            when="When chosen completions, too, are worse than what the policy writes.",
            learning_rate=_AS_DPO,
        ),
        Objective(
            name="sft",
            function=reference_free.sft,
            kind="pair",
            options={},
            convention="averaged over all tokens of chosen completions in a step",
            when="Beside a preference loss, to keep chosen completions likely; alone, to imitate them.",
            learning_rate=("1e-4 to 2e-4", "1e-5 to 2e-5"),
            averaged="tokens",
        ),
        Objective(
            name="simpo",
            function=reference_free.simpo,
            kind="pair",
            options={"beta": POSITIVE, "simpo_gamma": Range(0), "label_smoothing": PROBABILITY},
            convention="log-probs averaged over completion tokens; no reference; simpo_gamma is a lead of the reward",
            when="When a reference costs too much and the data suit the policy; sensitive to the learning rate.",
            learning_rate=("5e-6 to 1e-5", "3e-7 to 1e-6"),
        ),
        Objective(
            name="cpo",
            function=reference_free.cpo,
            kind="pair",
            options={"beta": POSITIVE, "label_smoothing": PROBABILITY, "cpo_alpha": Range(0)},
            convention="log-probs summed over completion tokens; no reference; cpo_alpha weighs the likelihood",
            when="When imitation of chosen completions and contrast are wanted in one pass without a reference.",
            learning_rate=("5e-5 to 1e-4", "1e-6 to 5e-6"),
        ),
        Objective(
            name="orpo",
            function=reference_free.orpo,
            kind="pair",
            options={"beta": POSITIVE},
            convention="log-probs averaged over completion tokens; no reference; beta is the paper's lambda",
            when="From a base model, instead of SFT and then DPO.",
            learning_rate=("5e-5 to 1e-4", "5e-6 to 8e-6"),
        ),
        Objective(
            name="odds_ratio",
            function=reference_free.odds_ratio,
            kind="pair",
            options={"beta": POSITIVE},
            convention="log-probs averaged over completion tokens; no reference; beta is the paper's lambda",
            when="Combined with sft: ORPO with the likelihood averaged over the tokens of a step.",
            learning_rate=("5e-5 to 1e-4", "5e-6 to 8e-6"),
        ),
        Objective(
            name="plackett_luce",
            function=ranked.plackett_luce,
            kind="ranked",
            options={"beta": POSITIVE},
            convention="log-probs summed over completion tokens; the best completion first; beta per nat",
            when="When three or more completions of a prompt are ranked.",
            learning_rate=_AS_DPO,
            f_divergence=True,
        ),
    )
}


def check_options(name: str, options: Mapping[str, float]) -> str | None:
    """What is wrong with an objective's name or options, as a sentence; None when nothing is.

    >>> check_options("sigmoid", {"beta": 0.1}) is None
    True
    >>> check_options("sigmoid", {"beta": 0.0})
    "beta is 0.0; for loss 'sigmoid' it must be above 0."
    """
    if name not in OBJECTIVES:
        near = get_close_matches(name, OBJECTIVES, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        return f"loss {name!r} is not known{hint} Known are: {', '.join(sorted(OBJECTIVES))}."
    allowed = OBJECTIVES[name].options
    for option, value in options.items():
        if option not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes no options"
            return f"{option} does not apply to loss {name!r}; {takes}."
        if value not in allowed[option]:
            return f"{option} is {value}; for loss {name!r} it must be {allowed[option].words}."
    return None
