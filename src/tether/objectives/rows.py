"""The table of losses, the registry's one source: a new loss of a kind that is here is a function and one entry.

What the columns are is said in `tether.objectives.objective.Objective`; formulae and papers are with the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tether.objectives import options
from tether.objectives.losses import (
    anchored,
    pairwise,
    policy_gradient,
    ranked,
    reference_free,
    reward,
    supervised,
    unpaired,
)
from tether.objectives.objective import Input, Objective, of_pair

_LOGRATIOS, _MEAN_LOGRATIOS = of_pair("logratios"), of_pair("logratios", per_token=True)
_LOGPS, _MEAN_LOGPS = of_pair("logps"), of_pair("logps", per_token=True)
_MARGIN, _OPTIONAL_MARGIN = Input("margins"), Input("margins", optional=True)
_JUDGED = (Input("logratios"), Input("desirable"))

_SUMMED = "log-probs summed over completion tokens; beta per nat"
_LIKELIHOOD = "cpo_alpha times the likelihood, averaged over the chosen tokens of a step"
# Where training usually begins, for LoRA and for full fine-tuning: the papers' recipes and common practice.
_AS_DPO = ("5e-6 to 5e-5", "3e-7 to 1e-6")
_AS_SFT = ("1e-4 to 2e-4", "5e-6 to 2e-5")
_AS_SIMPO, _AS_CPO = ("5e-6 to 1e-5", "3e-7 to 1e-6"), ("5e-5 to 1e-4", "1e-6 to 5e-6")
_AS_ORPO = ("5e-5 to 1e-4", "5e-6 to 8e-6")

_dpo = partial(Objective, algorithm="dpo", kind="pair", learning_rate=_AS_DPO)
_kto = partial(
    Objective, algorithm="kto", kind="unpaired", options=(options.BETA, *options.CLASS_WEIGHTS), learning_rate=_AS_DPO
)
_sft = partial(
    Objective,
    algorithm="sft",
    kind="completion",
    inputs=(Input("token_logps"),),
    learning_rate=_AS_SFT,
    averaged="tokens",
)
_cpo = partial(Objective, algorithm="cpo", kind="pair", around=(options.CPO_ALPHA, options.ALPHA))

_RATIOS, _ADVANTAGES, _OF_POLICY = Input("log_ratios"), Input("advantages"), Input("token_logps")
_AS_GRPO = ("1e-5 to 1e-4", "1e-6 to 3e-6")
_grpo = partial(
    Objective,
    algorithm="grpo",
    kind="prompt_only",
    function=policy_gradient.clipped,
    inputs=(_RATIOS, _ADVANTAGES),
    options=options.CLIP,
    around=(options.KL_WEIGHT,),
    learning_rate=_AS_GRPO,
)
_PER_COMPLETION = "averaged over the tokens of each completion, then over the completions of a step"
_PER_TOKEN = "averaged over the trained tokens of a step"
_SUMMED_UP = "summed over the tokens of each completion, averaged over the completions of a step"

ROWS: Sequence[Objective] = (
    _dpo(
        name="sigmoid",
        function=pairwise.sigmoid,
        inputs=(*_LOGRATIOS, _OPTIONAL_MARGIN),
        options=(options.BETA, options.LABEL_SMOOTHING),
        convention=f"{_SUMMED}; label_smoothing is the chance of a wrong label",
        when="The default: start here. Takes label_smoothing for noisy labels and a column margin.",
        f_divergence=True,
    ),
    _dpo(
        name="sigmoid_norm",
        function=pairwise.sigmoid_norm,
        inputs=_MEAN_LOGRATIOS,
        options=(options.BETA, options.LABEL_SMOOTHING),
        convention="log-ratios averaged over completion tokens; beta per nat per token",
        when="When DPO makes completions longer; the length of a completion no longer counts.",
        f_divergence=True,
    ),
    _dpo(
        name="hinge",
        function=pairwise.hinge,
        inputs=(*_LOGRATIOS, _OPTIONAL_MARGIN),
        options=(options.BETA,),
        convention=_SUMMED,
        when="When pairs that are well apart should no longer pull.",
        f_divergence=True,
    ),
    _dpo(
        name="ipo",
        function=pairwise.ipo,
        inputs=_MEAN_LOGRATIOS,
        options=(options.BETA,),
        convention="log-ratios averaged over completion tokens; beta is the paper's tau",
        when="When DPO overfits labels that are nearly always the same; it aims at a fixed lead.",
        f_divergence=True,
    ),
    _dpo(
        name="exo_pair",
        function=pairwise.exo_pair,
        inputs=_LOGRATIOS,
        options=(options.BETA, options.EXO_SMOOTHING),
        convention=f"{_SUMMED}; label_smoothing is the paper's epsilon",
        when="When the policy should seek the mode of the preferences instead of covering them.",
        f_divergence=True,
    ),
    _dpo(
        name="robust",
        function=pairwise.robust,
        inputs=_LOGRATIOS,
        options=(options.BETA, options.LABEL_SMOOTHING),
        convention=f"{_SUMMED}; label_smoothing is the known rate of flipped labels",
        when="When labels are flipped at a rate that you know.",
        f_divergence=True,
    ),
    _dpo(
        name="discopop",
        function=pairwise.discopop,
        inputs=_LOGRATIOS,
        options=(options.BETA, options.DISCOPOP_TAU),
        convention=f"{_SUMMED}; discopop_tau is the temperature of the blend",
        when="To try a loss that was found by search; it is not convex.",
        f_divergence=True,
    ),
    _dpo(
        name="dpop",
        function=pairwise.dpop,
        inputs=_LOGRATIOS,
        options=(options.BETA, options.DPOP_LAMBDA),
        convention=f"{_SUMMED}; dpop_lambda weighs nats that the chosen one lost",
        when="When chosen and rejected differ by a few tokens and DPO makes both less likely.",
    ),
    _dpo(
        name="rpo",
        function=pairwise.rpo,
        inputs=(*_LOGRATIOS, _MARGIN),
        options=(options.BETA, options.RPO_ETA),
        convention=f"{_SUMMED}; rpo_eta times the column margin is the gap aimed at",
        when="When a reward model or judge gave scores: the column margin has their difference.",
        f_divergence=True,
    ),
    _dpo(
        name="tdpo1",
        function=pairwise.tdpo1,
        inputs=(*_LOGRATIOS, *of_pair("reference_kl")),
        options=(options.BETA,),
        convention=f"{_SUMMED}; KL(reference, policy) of whole distributions, summed over tokens",
        when="To balance the KL of chosen and rejected; costs two projections by each head per token.",
    ),
    _dpo(
        name="tdpo2",
        function=pairwise.tdpo2,
        inputs=(*_LOGRATIOS, *of_pair("reference_kl")),
        options=(options.BETA, options.TDPO_ALPHA),
        convention=f"{_SUMMED}; KL(reference, policy) of whole distributions, summed over tokens",
        when="As tdpo1, with the balance weighed by tdpo_alpha; the paper's preferred one.",
    ),
    _dpo(
        name="aot",
        function=pairwise.aot,
        inputs=(*_LOGPS, *of_pair("reference_logps")),
        options=(options.BETA, options.LABEL_SMOOTHING),
        convention="margins of policy and reference, each sorted over the micro-batch; beta per nat",
        when="When margins should grow as a whole rather than pair by pair; use large micro-batches.",
        averaged="micro_batch",
    ),
    _dpo(
        name="aot_unpaired",
        function=pairwise.aot_unpaired,
        inputs=_LOGRATIOS,
        options=(options.BETA, options.LABEL_SMOOTHING),
        convention="log-ratios of chosen and of rejected, each sorted over the micro-batch; beta per nat",
        when="When chosen and rejected do not belong together in pairs; use large micro-batches.",
        averaged="micro_batch",
    ),
    _dpo(
        name="nca_pair",
        function=anchored.nca_pair,
        inputs=_LOGRATIOS,
        options=(options.BETA,),
        convention=_SUMMED,
        when="When the chosen completion must not become less likely, as under DPO it often does.",
    ),
    _dpo(
        name="bco_pair",
        function=anchored.bco_pair,
        inputs=_LOGRATIOS,
        options=(options.BETA,),
        convention=f"{_SUMMED}; no shift",
        when="When each label is reliable on its own: chosen is good, rejected is bad.",
    ),
    _dpo(
        name="sppo_hard",
        function=anchored.sppo_hard,
        inputs=_LOGRATIOS,
        options=(options.BETA,),
        convention="log-probs summed over completion tokens; beta is 1 / eta, aimed at are 1 / (2 beta) nats",
        when="For rounds of self-play, with a fresh reference and fresh completions each round.",
    ),
    _dpo(
        name="apo_zero",
        function=anchored.apo_zero,
        inputs=_LOGRATIOS,
        options=(options.BETA,),
        convention=_SUMMED,
        when="When the chosen completions are better than what the policy writes.",
    ),
    _dpo(
        name="apo_down",
        function=anchored.apo_down,
        inputs=_LOGRATIOS,
        options=(options.BETA,),
        convention=_SUMMED,
        when="When chosen completions, too, are worse than what the policy writes.",
    ),
    _dpo(
        name="sft",
        function=reference_free.sft,
        inputs=(Input("token_logps", "chosen"),),
        convention="averaged over all tokens of chosen completions in a step",
        when="Beside a preference loss, to keep chosen completions likely; alone, to imitate them.",
        learning_rate=("1e-4 to 2e-4", "1e-5 to 2e-5"),
        averaged="tokens",
    ),
    _dpo(
        name="simpo",
        function=reference_free.simpo,
        inputs=_MEAN_LOGPS,
        options=(options.BETA, options.SIMPO_GAMMA, options.LABEL_SMOOTHING),
        convention="log-probs averaged over completion tokens; no reference; simpo_gamma is a lead of the reward",
        when="When a reference costs too much and the data suit the policy; sensitive to the learning rate.",
        learning_rate=_AS_SIMPO,
    ),
    _dpo(
        name="cpo",
        function=reference_free.cpo,
        inputs=(*_LOGPS, Input("logps", "chosen", per_token=True)),
        options=(options.BETA, options.LABEL_SMOOTHING, options.CPO_ALPHA),
        convention="log-probs summed over completion tokens; no reference; cpo_alpha weighs the likelihood",
        when="When imitation of chosen completions and contrast are wanted in one pass without a reference.",
        learning_rate=_AS_CPO,
    ),
    _dpo(
        name="orpo",
        function=reference_free.orpo,
        inputs=_MEAN_LOGPS,
        options=(options.BETA,),
        convention="log-probs averaged over completion tokens; no reference; beta is the paper's lambda",
        when="From a base model, instead of SFT and then DPO.",
        learning_rate=_AS_ORPO,
    ),
    _dpo(
        name="odds_ratio",
        function=reference_free.odds_ratio,
        inputs=_MEAN_LOGPS,
        options=(options.BETA,),
        convention="log-probs averaged over completion tokens; no reference; beta is the paper's lambda",
        when="Combined with sft: ORPO with the likelihood averaged over the tokens of a step.",
        learning_rate=_AS_ORPO,
    ),
    _dpo(
        name="plackett_luce",
        function=ranked.plackett_luce,
        inputs=(Input("logratios"),),
        kind="ranked",
        options=(options.BETA,),
        convention="log-probs summed over completion tokens; the best completion first; beta per nat",
        when="When three or more completions of a prompt are ranked.",
        f_divergence=True,
    ),
    _kto(
        name="kto",
        function=unpaired.kto,
        inputs=(*_JUDGED, Input("mismatched_mean")),
        convention=f"{_SUMMED}; the baseline z0 is the mean log-ratio, at least 0, of other rows' completions "
        "under each prompt, over the whole optimizer step (in evaluation: over the whole set)",
        when="Single completions with a thumb up or down, or pairs that do not belong together.",
    ),
    _kto(
        name="apo_zero_unpaired",
        function=unpaired.apo_zero_unpaired,
        inputs=_JUDGED,
        convention=f"{_SUMMED}; anchored at a log-ratio of 0",
        when="Single completions, of which the desirable ones are better than what the model writes.",
    ),
    _kto(
        name="bco",
        function=unpaired.bco,
        inputs=(*_JUDGED, Input("running_mean")),
        convention=f"{_SUMMED}; the baseline is the mean log-ratio of all rows in earlier steps",
        when="Single completions; a classifier of good and bad, whose threshold follows the rewards.",
    ),
    _sft(
        name="nll",
        key="sft",
        function=supervised.nll,
        convention="averaged over all scored tokens of a step",
        when="Texts to imitate, often before a preference objective.",
    ),
    _sft(
        name="dft",
        function=supervised.dft,
        convention="averaged over all scored tokens of a step, each weighed by its probability",
        when="Texts to imitate, when tokens that are unlike the model's own should not dominate.",
    ),
    Objective(
        algorithm="reward",
        name="reward",
        function=reward.bradley_terry,
        inputs=(*of_pair("rewards"), _OPTIONAL_MARGIN),
        kind="pair",
        options=(options.CENTER,),
        convention="rewards at the last token of each completion",
        when="Pairs, to train a reward model and no policy.",
        learning_rate=("1e-4", "1e-5"),
    ),
    Objective(
        algorithm="orpo",
        name="odds_ratio",
        key="orpo",
        function=reference_free.odds_ratio,
        inputs=_MEAN_LOGPS,
        kind="pair",
        options=(options.BETA,),
        convention="beta times the odds ratio of mean log-probs per token; the likelihood of prompts and chosen "
        "completions is averaged over the tokens of a step",
        when="As `orpo` of DPOTrainer, with the likelihood as in the authors' code and in TRL.",
        learning_rate=_AS_ORPO,
    ),
    _cpo(
        name="sigmoid",
        key="cpo",
        function=pairwise.sigmoid,
        inputs=_LOGPS,
        options=(options.BETA, options.LABEL_SMOOTHING),
        convention=f"log-probs summed over completion tokens; {_LIKELIHOOD}",
        when="As `cpo` of DPOTrainer, with the likelihood averaged over tokens as in TRL.",
        learning_rate=_AS_CPO,
    ),
    _cpo(
        name="hinge",
        key=None,
        function=pairwise.hinge,
        inputs=_LOGPS,
        options=(options.BETA,),
        convention=f"log-probs summed over completion tokens; {_LIKELIHOOD}",
        when="When pairs that are well apart should no longer pull.",
        learning_rate=_AS_CPO,
    ),
    _cpo(
        name="ipo",
        key=None,
        function=pairwise.ipo,
        inputs=_MEAN_LOGPS,
        options=(options.BETA,),
        convention=f"log-probs averaged over completion tokens; {_LIKELIHOOD}",
        when="When a fixed lead of the chosen completion is aimed at.",
        learning_rate=_AS_CPO,
    ),
    _cpo(
        name="simpo",
        # TRL adds a likelihood to SimPO unless it is told not to; the paper has none, and so it is in a run file.
        preset={"cpo_alpha": 0.0},
        function=reference_free.simpo,
        inputs=_MEAN_LOGPS,
        options=options.SIMPO,
        convention=f"log-probs averaged over completion tokens; {_LIKELIHOOD}",
        when="As `simpo` of DPOTrainer; `cpo_alpha` adds a likelihood (CPO-SimPO).",
        learning_rate=_AS_SIMPO,
    ),
    _cpo(
        name="alphapo",
        preset={"cpo_alpha": 0.0},
        function=reference_free.simpo,
        inputs=_MEAN_LOGPS,
        options=options.SIMPO,
        convention="stands for `simpo` with `cpo_alpha` 0; `alpha` shapes the reward",
        when="SimPO with another shape of the reward.",
        learning_rate=_AS_SIMPO,
    ),
    _grpo(
        name="grpo",
        averaged="completions",
        convention=f"ratios per token; {_PER_COMPLETION}",
        when="Completions that the policy samples in groups, judged by rewards; each completion counts alike.",
    ),
    _grpo(
        name="dapo",
        averaged="tokens",
        convention=f"ratios per token; {_PER_TOKEN}",
        when="The default: as `grpo`, where long completions should count by their tokens.",
    ),
    _grpo(
        name="dr_grpo",
        averaged="longest",
        preset={"scale_rewards": "none"},
        convention="ratios per token; summed over tokens, over the most tokens a completion may have, averaged over "
        "the completions of a step",
        when="When lengths drift: no completion's own length divides its loss; with `scale_rewards: none`.",
    ),
    _grpo(
        name="bnpo",
        averaged="tokens",
        convention=f"ratios per token; {_PER_TOKEN}: `dapo` here (TRL's is over the micro-batch)",
        when="For runs that were made with it.",
    ),
    _grpo(
        name="gspo",
        averaged="completions",
        level="sequence",
        convention=f"one ratio for each completion, of mean log-probs per token; {_PER_COMPLETION}",
        when="Mixtures of experts, and long completions, where ratios of tokens are noisy.",
    ),
    _grpo(
        name="cispo",
        function=policy_gradient.cispo,
        inputs=(_RATIOS, _ADVANTAGES, _OF_POLICY),
        options=(options.LARGEST_WEIGHT,),
        preset={"epsilon_high": 5.0},
        averaged="tokens",
        convention=f"ratios per token are weights without gradient, at most epsilon_high; {_PER_TOKEN}",
        when="When rare tokens that decide should keep their gradient, which a clip takes.",
    ),
    _grpo(
        name="sapo",
        function=policy_gradient.sapo,
        options=options.SAPO,
        averaged="completions",
        convention=f"ratios per token through a soft gate; {_PER_COMPLETION}",
        when="When several updates are made of one rollout and a hard clip loses too much.",
    ),
    _grpo(
        name="luspo",
        averaged="completion_sums",
        level="sequence",
        convention=f"one ratio for each completion, of mean log-probs per token; {_SUMMED_UP}",
        when="As `gspo`, when completions become too short.",
    ),
    _grpo(
        name="vespo",
        function=policy_gradient.vespo,
        inputs=(Input("log_weights"), _ADVANTAGES, _OF_POLICY),
        options=options.VESPO,
        averaged="tokens",
        convention=f"a weight of each whole completion without gradient; {_PER_TOKEN}",
        when="When rollouts are older than the policy.",
    ),
    _grpo(
        name="reinforce",
        function=policy_gradient.reinforce,
        inputs=(_ADVANTAGES, _OF_POLICY),
        options=(),
        averaged="tokens",
        convention=f"no ratios: one update of each rollout; {_PER_TOKEN}",
        when="The plainest estimate, to compare with.",
    ),
    _grpo(
        algorithm="rloo",
        name="rloo",
        averaged="completions",
        level="sum",
        around=(options.KL_PENALTY,),
        convention="one ratio for each completion, of summed log-probs; averaged over the completions of a step; the "
        "KL divergence is a part of the reward",
        when="Completions that the policy samples, each compared with the others of its prompt.",
    ),
)
