"""What may stand together in one objective, what may not, and why (INV-24)."""

from __future__ import annotations

import dataclasses

import pytest

from tether import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardConfig
from tether.config import build, check_run
from tether.errors import ConfigError
from tether.objectives import OBJECTIVES, Option, Range


def config(**options):
    return DPOConfig(output_dir="unused", report_to="none", use_cpu=True, **options)


REFUSED = [
    ({"loss_type": "sigmod"}, "loss_type 'sigmod' is not known; did you mean sigmoid?"),
    ({"loss_type": []}, "loss_type is empty"),
    ({"loss_type": ["sigmoid", "sigmoid"]}, "names a loss twice"),
    ({"loss_type": ["sigmoid", "plackett_luce"]}, "sigmoid from pair data, plackett_luce from ranked data"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 values"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.0]}, "each must be above 0"),
    ({"loss_weights": [float("nan")]}, "each must be above 0"),
    ({"beta": 0.0}, "beta is 0.0; for loss 'sigmoid' it must be above 0."),
    ({"beta": float("inf")}, "beta is inf"),
    ({"label_smoothing": 0.5}, "at least 0 and below 0.5"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing does not apply to loss 'hinge'; it takes beta."),
    ({"loss_type": "exo_pair"}, "label_smoothing is 0.0; for loss 'exo_pair' it must be above 0"),
    ({"loss_type": "sft", "beta": 0.2}, "beta does not apply to loss 'sft'; it takes no options"),
    ({"discopop_tau": 0.1}, "discopop_tau does not apply to loss 'sigmoid'"),
    ({"dpop_lambda": 1.0}, "dpop_lambda does not apply"),
    ({"loss_type": ["ipo", "hinge"], "simpo_gamma": 1.0}, "simpo_gamma does not apply to loss ipo, hinge"),
    ({"f_divergence_type": "total_variation"}, "allowed are reverse_kl, forward_kl"),
    ({"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef has no effect with f_divergence_type 'reverse_kl'"),
    ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": float("inf")}, "must be a number"),
    ({"loss_type": "sft", "f_divergence_type": "forward_kl"}, "no effect on 'sft': there is no reference"),
    ({"loss_type": "simpo", "f_divergence_type": "forward_kl"}, "there is no reference to diverge from"),
    ({"ld_alpha": 1.1}, "ld_alpha is 1.1; it must be at least 0 and at most 1."),
    ({"loss_type": "sft", "ld_alpha": 0.5}, "ld_alpha has no effect on 'sft'"),
    ({"loss_type": "orpo", "ld_alpha": 0.5}, "ld_alpha has no meaning for orpo"),
    ({"loss_type": "tdpo1", "ld_alpha": 0.5}, "ld_alpha has no meaning for a KL per token"),
    ({"loss_type": "aot", "use_weighting": True}, "use_weighting has no meaning for aot, which sorts"),
    ({"loss_type": "plackett_luce", "use_weighting": True}, "the weight is that of a pair"),
    ({"loss_type": "aot", "per_device_train_batch_size": 1}, "aot sorts the pairs of a micro-batch"),
    ({"loss_type": "simpo", "reference": "start"}, "no loss among simpo compares with a reference"),
    ({"loss_type": "tdpo2", "reference": "none"}, "takes the reference's whole distribution at each token"),
    ({"loss_type": ["orpo"], "reference_method": "snapshot"}, "no loss among orpo compares with a reference"),
    *(
        ({"loss_type": name, "f_divergence_type": "js_divergence"}, f"has no meaning for {name}")
        for name in ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "dpop")
    ),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_has_no_meaning_is_refused_at_construction(options, words):
    with pytest.raises(ConfigError, match=r"^[a-z]") as caught:
        config(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "forward_kl", "ld_alpha": 0.5, "use_weighting": True},
        {"loss_type": ["robust", "hinge"], "label_smoothing": 0.1},
        {"loss_type": "simpo", "reference": "none"},
        {"loss_type": "exo_pair", "label_smoothing": 1e-3},
        *({"loss_type": name, "label_smoothing": 1e-3 * (name == "exo_pair")} for name in OBJECTIVES["dpo"]),
    ],
)
def test_what_has_a_meaning_is_accepted(options):
    arguments = config(**options)
    combination = arguments.combination()
    assert combination.convention().startswith("objective: ")
    assert all(name in combination.convention() for name in combination.losses)
    assert (arguments.reference == "none") == (not combination.needs_reference)


def test_a_loss_gets_the_options_that_it_takes():
    combination = config(loss_type=["robust", "hinge"], label_smoothing=0.1, beta=0.3).combination()
    robust, hinge = combination.rows
    assert combination.options_of(robust) == {"beta": 0.3, "label_smoothing": 0.1}
    assert combination.options_of(hinge) == {"beta": 0.3}
    assert combination.convention() == (
        "objective: robust (beta 0.3, label_smoothing 0.1): log-probs summed over completion tokens; beta per nat; "
        "label_smoothing is the known rate of flipped labels; hinge (beta 0.3): log-probs summed over completion "
        "tokens; beta per nat"
    )


CONFIGURATIONS = {config.algorithm: config for config in (DPOConfig, KTOConfig, ORPOConfig, CPOConfig, RewardConfig)}


@pytest.mark.parametrize("algorithm", CONFIGURATIONS)
def test_every_option_in_the_registry_has_a_field_with_its_default_and_text(algorithm):
    """`exo_pair` alone has another default, which `DPOConfig` leaves for its user to say, as TRL does."""
    fields = {field.name: field for field in dataclasses.fields(CONFIGURATIONS[algorithm])}
    for row in OBJECTIVES[algorithm].values():
        for option in (*row.options, *row.around):
            field = fields[option.name]
            assert field.default == option.default or (row.name, option.name) == ("exo_pair", "label_smoothing")
            assert field.metadata["help"].key == f"objective.{option.name}"
            assert f"    {option.name}: {option.text[:30]}" in CONFIGURATIONS[algorithm].__doc__


def test_a_row_with_an_option_of_its_own_gives_a_field_and_its_check(monkeypatch):
    """Adding a loss takes no other place than the row."""
    zeta = Option("zeta", 2.0, Range(1), "Weight of the new term.")
    row = dataclasses.replace(
        OBJECTIVES["kto"]["kto"], name="new", function=lambda r, label, z0, *, zeta: r * zeta, options=(zeta,)
    )
    monkeypatch.setitem(OBJECTIVES["kto"], "new", row)

    @dataclasses.dataclass
    class Config(KTOConfig, algorithm="kto"):
        """A configuration."""

    arguments = Config(output_dir="unused", report_to="none", use_cpu=True, loss_type="new", zeta=3.0)
    assert arguments.objective_options() == {"zeta": 3.0}
    assert "zeta: Weight of the new term. Must be at least 1." in Config.__doc__
    with pytest.raises(ConfigError, match=r"zeta is 0\.5; for loss 'new' it must be at least 1") as caught:
        Config(output_dir="unused", report_to="none", use_cpu=True, loss_type="new", zeta=0.5)
    assert caught.value.field == "zeta"
    with pytest.raises(ConfigError, match="zeta does not apply to loss 'kto'; it takes beta, desirable_weight"):
        Config(output_dir="unused", report_to="none", use_cpu=True, zeta=3.0)


def test_the_run_file_says_the_same():
    """Every key of `objective` arrives, lists included, and what is wrong is named as the run file writes it."""
    rows = {"model": "tiny", "data": {"train": "pairs.jsonl"}, "output": "unused"}
    section = {
        "loss": ["discopop", "sft", "dpop", "rpo", "simpo", "cpo"],
        "weights": [1.0, 0.2, 0.3, 0.4, 0.5, 0.6],
        "beta": 0.3,
        "label_smoothing": 0.1,
        "ld_alpha": None,
        "use_weighting": True,
        "discopop_tau": 0.1,
        "dpop_lambda": 3.0,
        "rpo_eta": 2.0,
        "simpo_gamma": 0.7,
        "cpo_alpha": 0.9,
    }
    arguments, _, _ = build(check_run({**rows, "objective": section}))
    assert (arguments.loss_type, arguments.loss_weights) == (section["loss"], section["weights"])
    for name in section.keys() - {"loss", "weights"}:
        assert getattr(arguments, name) == section[name], name
    divergence = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}
    arguments, _, _ = build(check_run({**rows, "objective": divergence}))
    assert (arguments.f_divergence_type, arguments.f_alpha_divergence_coef) == ("alpha_divergence", 0.7)
    for wrong, words in (
        ({"loss": ["sigmoid", "sft"], "weights": [1.0]}, "`objective.weights` has 1 values"),
        ({"loss": []}, "`objective.loss` is [] (a list); allowed is the name of a loss, or a list of names"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "`objective.label_smoothing` does not apply to loss 'hinge'"),
    ):
        with pytest.raises(ConfigError) as caught:
            build(check_run({**rows, "objective": wrong}))
        assert words in str(caught.value)
