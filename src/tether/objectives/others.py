"""Objectives of other trainers than `DPOTrainer`, as rows like those of the table of pairs and ranked lists."""

from __future__ import annotations

from tether.objectives import reward, supervised, unpaired
from tether.objectives.row import POSITIVE, Objective, Range

_SUMMED = "log-probs summed over completion tokens; beta per nat"
_JUDGED = {"beta": POSITIVE, "desirable_weight": POSITIVE, "undesirable_weight": POSITIVE}
_AS_DPO = ("5e-6 to 5e-5", "3e-7 to 1e-6")
_AS_SFT = ("1e-4 to 2e-4", "5e-6 to 2e-5")

OTHER_OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective(
            name="kto",
            function=unpaired.kto,
            kind="unpaired",
            options=_JUDGED,
            convention=f"{_SUMMED}; the baseline z0 is the mean log-ratio, at least 0, of other rows' completions "
            "under each prompt, over the whole optimizer step (in evaluation: over the whole set)",
            when="Single completions with a thumb up or down, or pairs that do not belong together.",
            learning_rate=_AS_DPO,
        ),
        Objective(
            name="apo_zero_unpaired",
            function=unpaired.apo_zero_unpaired,
            kind="unpaired",
            options=_JUDGED,
            convention=f"{_SUMMED}; anchored at a log-ratio of 0",
            when="Single completions, of which the desirable ones are better than what the model writes.",
            learning_rate=_AS_DPO,
        ),
        Objective(
            name="bco",
            function=unpaired.bco,
            kind="unpaired",
            options=_JUDGED,
            convention=f"{_SUMMED}; the baseline is the mean log-ratio of all rows in earlier steps",
            when="Single completions; a classifier of good and bad, whose threshold follows the rewards.",
            learning_rate=_AS_DPO,
        ),
        Objective(
            name="nll",
            function=supervised.nll,
            kind="completion",
            options={},
            convention="averaged over all scored tokens of a step",
            when="Texts to imitate, often before a preference objective.",
            learning_rate=_AS_SFT,
            averaged="tokens",
        ),
        Objective(
            name="dft",
            function=supervised.dft,
            kind="completion",
            options={},
            convention="averaged over all scored tokens of a step, each weighed by its probability",
            when="Texts to imitate, when tokens that are unlike the model's own should not dominate.",
            learning_rate=_AS_SFT,
            averaged="tokens",
        ),
        Objective(
            name="reward",
            function=reward.bradley_terry,
            kind="pair",
            options={"center_rewards_coefficient": Range(0)},
            convention="rewards at the last token of each completion",
            when="Pairs, to train a reward model and no policy.",
            learning_rate=("1e-4", "1e-5"),
        ),
    )
}


def option_problem(name: str, options: dict[str, float]) -> str | None:
    """What is wrong with the options of one of these objectives, as a sentence; None when nothing is.

    >>> option_problem("kto", {"beta": 0.1, "desirable_weight": -1.0})
    "desirable_weight is -1.0; for loss 'kto' it must be above 0."
    """
    allowed = OTHER_OBJECTIVES[name].options
    for option, value in options.items():
        if value not in allowed[option]:
            return f"{option} is {value}; for loss {name!r} it must be {allowed[option].words}."
    return None
