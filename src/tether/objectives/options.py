"""Every option of a loss, declared once: its name, default, bounds and line of text; names and defaults are TRL's."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from tether.objectives.objective import Option, Range

_POSITIVE, _PROBABILITY = Range(0, low_included=False), Range(0, 0.5)
BETA = Option(
    "beta", 0.1, _POSITIVE, "How strongly the policy is held to the reference, per nat; its scale depends on the loss."
)
LABEL_SMOOTHING = Option("label_smoothing", 0.0, _PROBABILITY, "Chance that a label is wrong; above 0 for `exo_pair`.")
# DPOConfig leaves it at 0, as in TRL, so that who takes `exo_pair` has to say it.
EXO_SMOOTHING = Option("label_smoothing", 1e-3, Range(0, 0.5, low_included=False), LABEL_SMOOTHING.text)
DISCOPOP_TAU = Option("discopop_tau", 0.05, _POSITIVE, "Temperature of `discopop`.")
DPOP_LAMBDA = Option("dpop_lambda", 50.0, Range(0), "Weight of the penalty of `dpop`.")
TDPO_ALPHA = Option("tdpo_alpha", 0.5, _POSITIVE, "Weight of the difference of KLs in `tdpo2`.")
RPO_ETA = Option("rpo_eta", 1.0, _POSITIVE, "Scale of the reward gap that `rpo` fits.")
SIMPO_GAMMA = Option("simpo_gamma", 0.5, Range(0), "Lead of the chosen reward that `simpo` aims at.")
CPO_ALPHA = Option("cpo_alpha", 1.0, Range(0), "Weight of the likelihood of the chosen completions; 0 leaves it out.")
ALPHA = Option(
    "alpha", 0.0, Range(-inf, low_included=False), "Shape of the reward `(1 - p^-alpha) / alpha`; 0 for `log p`."
)
CLASS_WEIGHTS = (
    Option("desirable_weight", 1.0, _POSITIVE, "Factor of the losses of desirable rows."),
    Option("undesirable_weight", 1.0, _POSITIVE, "Factor of the losses of the other rows."),
)
CENTER = Option(
    "center_rewards_coefficient",
    None,
    Range(0),
    "Weight of a term that draws the rewards' mean to 0; unset: none. The paper uses 0.01.",
)

# TRL's order, and any lead as in TRL.
SIMPO = (BETA, LABEL_SMOOTHING, replace(SIMPO_GAMMA, allowed=ALPHA.allowed))

# Of sampled completions.
KL_WEIGHT = Option("beta", 0.0, Range(0), "Weight of the KL divergence from the reference, per nat; 0: no reference.")
KL_PENALTY = Option(
    "beta", 0.05, Range(0), "What a nat of KL divergence from the reference costs in reward; 0: no reference."
)
_EPSILON_HIGH = Option("epsilon_high", None, _POSITIVE, "How far a ratio may be above 1; unset: as `epsilon`.")
CLIP = (
    Option("epsilon", 0.2, Range(0, 1), "How far a ratio may be below 1 before it is clipped."),
    _EPSILON_HIGH,
    Option("delta", None, _POSITIVE, "Bound of the ratio where the advantage is negative (dual clip); unset: none."),
)
LARGEST_WEIGHT = replace(
    _EPSILON_HIGH, text="Largest weight of `cispo`, itself and not its distance from 1; must be set."
)
SAPO = (
    Option("sapo_temperature_pos", 1.0, _POSITIVE, "Temperature of `sapo` where the advantage is above 0."),
    Option("sapo_temperature_neg", 1.05, _POSITIVE, "Temperature of `sapo` elsewhere."),
)
VESPO = (
    Option("vespo_k_pos", 2.0, Range(0), "Power of the weight in `vespo` where the advantage is at least 0."),
    Option("vespo_lambda_pos", 3.0, Range(0), "Its decay there."),
    Option("vespo_k_neg", 3.0, Range(0), "Power of the weight in `vespo` where the advantage is negative."),
    Option("vespo_lambda_neg", 2.0, Range(0), "Its decay there."),
)
