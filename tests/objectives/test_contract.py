"""What every row of the table of objectives must hold (INV-23, 24, 27), against formulae written a second time."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from objectives.formulae import AT_ZERO, FLIPPED, FORMULAE
from tether.objectives import OBJECTIVES, Combination, check_options, options_of
from tether.objectives.objective import Input, of_pair
from tether.objectives.registry import FIELD_NAMES, unknown_loss

ROWS = OBJECTIVES["dpo"]
NAMES = sorted(ROWS)
# For each option two values besides its default; a row is tried with each.
OPTIONS = {
    "beta": (0.3, 1.5),
    "label_smoothing": (0.1, 0.3),
    "discopop_tau": (0.5, 2.0),
    "dpop_lambda": (0.7, 5.0),
    "tdpo_alpha": (0.2, 1.3),
    "rpo_eta": (0.5, 2.0),
    "simpo_gamma": (0.0, 1.2),
    "cpo_alpha": (0.0, 0.4),
}
# Inputs that a paper keeps constant in the gradient.
STOPPED = {("tdpo2", "chosen_reference_kl")}


def settings(row):
    """The defaults, and each option changed on its own."""
    cases = [dict(row.defaults)]
    for name in row.defaults:
        cases += [{**row.defaults, name: value} for value in OPTIONS[name]]
    return cases


def numbers(row, *, count=5, dtype=torch.float64, seed=0):
    """Inputs of a row: log-ratios of either sign, log-probs below zero, lists of three."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3) if row.kind == "ranked" else (count,)
    found = []
    for one in row.inputs:
        drawn = torch.randn(shape, generator=generator, dtype=dtype)
        # Probabilities need log-probs at most 0; those of a mean over tokens are near it.
        drawn = -drawn.abs() - 0.05 if one.quantity.endswith("logps") else 3 * drawn
        found.append(drawn.requires_grad_(one.quantity != "margins" and (row.name, one.name) not in STOPPED))
    return found


def formula(row, inputs, options):
    return torch.tensor(FORMULAE[row.name](*(one.tolist() for one in inputs), **options), dtype=torch.float64)


def test_every_row_has_a_formula():
    assert FORMULAE.keys() == ROWS.keys()
    assert options_of("dpo").keys() == OPTIONS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_the_formula(name):
    """INV-23: the value to 1e-10, and the gradient against central differences of the second formula."""
    row = ROWS[name]
    for options in settings(row):
        inputs = numbers(row)
        losses = row.function(*inputs, **options)
        torch.testing.assert_close(losses.detach(), formula(row, inputs, options), atol=1e-10, rtol=1e-10)
        losses.sum().backward()
        for place, one in enumerate(inputs):
            if not one.requires_grad:
                continue
            for index in itertools.product(*(range(size) for size in one.shape)):
                moved = []
                for step in (1e-6, -1e-6):
                    changed = [other.detach().clone() for other in inputs]
                    changed[place][index] += step
                    moved.append(formula(row, changed, options).sum().item())
                slope = (moved[0] - moved[1]) / 2e-6
                assert one.grad[index].item() == pytest.approx(slope, abs=1e-6, rel=1e-6), (options, place, index)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    row = ROWS[name]
    assert torch.autograd.gradcheck(lambda *inputs: row.function(*inputs, **row.defaults), numbers(row, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_extremes_are_finite(name, dtype):
    """INV-23: log-ratios of 10,000 nats either way and at a tie, probabilities of 0 and 1; values and gradients."""
    row = ROWS[name]
    logps = any(one.quantity.endswith("logps") for one in row.inputs)
    values = [-1e4, -1e-9, 0.0] if logps else [-1e4, 0.0, 1e4]
    columns = list(zip(*itertools.product(values, repeat=3 if row.kind == "ranked" else len(row.inputs)), strict=True))
    inputs = [torch.tensor(column, dtype=dtype) for column in columns]
    if row.kind == "ranked":
        inputs = [torch.stack(inputs, dim=-1)]
    for options in ({**row.defaults, "beta": 1.0} if "beta" in row.defaults else {}, row.defaults):
        leaves = [one.clone().requires_grad_() for one in inputs]
        losses = row.function(*leaves, **options)
        losses.sum().backward()
        assert losses.isfinite().all()
        for one, leaf in zip(row.inputs, leaves, strict=True):
            assert (row.name, one.name) in STOPPED or leaf.grad.isfinite().all(), one.name


@pytest.mark.parametrize("name", NAMES)
def test_order_of_the_batch(name):
    """A permutation of the examples permutes the losses; where rows are sorted, their sum stays."""
    row = ROWS[name]
    inputs = [one.detach() for one in numbers(row)]
    order = torch.tensor([3, 0, 4, 1, 2])
    losses = row.function(*inputs, **row.defaults)
    permuted = row.function(*(one[order] for one in inputs), **row.defaults)
    if row.averaged == "micro_batch":
        torch.testing.assert_close(permuted.sum(), losses.sum())
        halves = [row.function(*(one[part] for one in inputs), **row.defaults) for part in (slice(2), slice(2, 5))]
        assert not torch.allclose(torch.cat(halves).sum(), losses.sum(), rtol=1e-4), "the row says that it sorts"
    else:
        torch.testing.assert_close(permuted, losses[order], atol=0, rtol=0)
        alone = torch.cat([row.function(*(one[i : i + 1] for one in inputs), **row.defaults) for i in range(5)])
        torch.testing.assert_close(alone, losses, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("name", sorted(AT_ZERO))
def test_value_at_zero_margin(name):
    """Ties, policy and reference alike: the number that the docstring names, in every setting."""
    row = ROWS[name]
    for options in settings(row):
        shape = (2, 3) if row.kind == "ranked" else (2,)
        zeros = [torch.zeros(shape, dtype=torch.float64) for _ in row.inputs]
        assert row.function(*zeros, **options).tolist() == pytest.approx([AT_ZERO[name](**options)] * 2, abs=1e-12)


@pytest.mark.parametrize("name", sorted(FLIPPED))
def test_smoothing_is_a_mixture_with_the_flipped_pair(name):
    """What a wrong label means: loss(e) from loss(0) of the pair and of the pair with its labels exchanged."""
    row = ROWS[name]
    inputs = [one.detach() for one in numbers(row)]
    if name == "sigmoid":
        inputs = inputs[:2]
    swap = [1, 0, 3, 2][: len(inputs)]
    plain = {**row.defaults, "label_smoothing": 0.0, **({"simpo_gamma": 0.0} if name == "simpo" else {})}
    kept = row.function(*inputs, **plain)
    flipped = row.function(*(inputs[i] for i in swap), **plain)
    if name == "aot":
        flipped = flipped.flip(0)  # the smallest difference is the largest one turned round
    smooth = row.function(*inputs, **{**plain, "label_smoothing": 0.2})
    torch.testing.assert_close(smooth, FLIPPED[name](kept, flipped, 0.2))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_changes_the_number(name):
    """INV-24: no option is without effect."""
    row = ROWS[name]
    inputs = numbers(row)
    found = [row.function(*inputs, **options).sum().item() for options in settings(row)]
    assert len({round(value, 9) for value in found}) == len(found)


def test_every_name_gives_another_number():
    """INV-24: on one pair, no two losses of it agree (margins of 0.7, 4 and 3 tokens)."""
    drawn = {"chosen_logps": -3.0, "rejected_logps": -4.5, "chosen_reference_logps": -4.0}
    drawn |= {"rejected_reference_logps": -4.2, "margins": 0.7}
    drawn |= {"chosen_reference_kl": 0.3, "rejected_reference_kl": 1.1}
    drawn |= {"chosen_logratios": -0.4, "rejected_logratios": -1.7}
    for side, tokens in (("chosen", 4), ("rejected", 3)):
        for what in ("logps", "logratios"):
            drawn[f"{side}_mean_{what}"] = drawn[f"{side}_{what}"] / tokens
    drawn["chosen_token_logps"] = drawn["chosen_mean_logps"]
    found = {}
    for name, row in ROWS.items():
        if row.kind == "pair":
            inputs = [torch.tensor([drawn[one.name]], dtype=torch.float64) for one in row.inputs]
            # Without smoothing, `robust` is DPO by definition.
            smoothing = {"label_smoothing": 0.1} if "label_smoothing" in row.defaults else {}
            found[name] = round(row.function(*inputs, **{**row.defaults, **smoothing}).item(), 9)
    assert found.pop("aot") == found["aot_unpaired"], "with one pair there is nothing to sort"
    assert len(set(found.values())) == len(found), found


@pytest.mark.parametrize("name", NAMES)
def test_the_row_says_what_its_options_may_be(name):
    """INV-24, 27: each bound is enforced, and the convention is in words."""
    row = ROWS[name]
    assert row.convention
    assert row.when.endswith(".")
    assert all(row.learning_rate)
    for option in row.options:
        allowed = option.allowed
        assert check_options((row,), {option.name: float("nan")}) is not None
        assert str(check_options((row,), {option.name: allowed.low - 1})) == (
            f"{option.name} is {allowed.low - 1}; for loss {name!r} it must be {allowed.words}."
        )
        assert check_options((row,), {option.name: option.default}) is None
        assert (check_options((row,), {option.name: allowed.low}) is None) == allowed.low_included
    assert "does not apply" in str(check_options((row,), {"zeta": 1.0}))
    assert Combination((name,), options=row.defaults).problem() is None


def test_a_row_cannot_disagree_with_its_function():
    with pytest.raises(TypeError, match="keyword parameters"):
        dataclasses.replace(ROWS["sigmoid"], options=ROWS["sigmoid"].options[:1])
    with pytest.raises(TypeError, match="1 inputs for 3 positional parameters"):
        dataclasses.replace(ROWS["sigmoid"], inputs=of_pair("logratios")[:1])


def test_whether_a_reference_is_loaded_hangs_on_what_a_row_takes_and_not_on_a_spelling():
    """The same function, which calls its numbers log-ratios, compares with nothing where it is given log-probs."""
    assert {name for name in ROWS if not ROWS[name].needs_reference} == {"sft", "simpo", "cpo", "orpo", "odds_ratio"}
    assert ROWS["aot"].needs_reference
    assert ROWS["aot"].takes("reference_logps")
    assert [OBJECTIVES["cpo"][name].function for name in ("sigmoid", "ipo")] == [
        ROWS[name].function for name in ("sigmoid", "ipo")
    ]
    assert not any(
        row.needs_reference for name in ("cpo", "orpo", "sft", "reward") for row in OBJECTIVES[name].values()
    )
    assert all(row.needs_reference for row in OBJECTIVES["kto"].values())
    assert not dataclasses.replace(ROWS["ipo"], inputs=of_pair("rewards")).needs_reference
    assert dataclasses.replace(ROWS["sft"], inputs=(Input("reference_kl", "chosen"),)).needs_reference


def test_two_completions_of_a_ranking_are_dpo():
    lists = torch.tensor([[0.3, -1.0], [2.0, 2.5]], dtype=torch.float64)
    pairs = ROWS["sigmoid"](lists[:, 0], lists[:, 1], beta=0.4)
    torch.testing.assert_close(ROWS["plackett_luce"].function(lists, beta=0.4), pairs)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *(("dpo", "sigmoid"), ("cDPO", "sigmoid"), ("exo", "exo_pair"), ("slic-hf", "hinge"), ("ipo_loss", "ipo")),
        *(
            ("tdpo", "tdpo1 or tdpo2"),
            ("sigmoidal", "sigmoid"),
            ("simgoid", "sigmoid"),
            ("ippo", "ipo"),
            ("dppo", "dpop"),
        ),
    ],
)
def test_a_name_of_the_field_leads_to_the_objective_and_not_to_a_like_spelling(said, meant):
    assert f"did you mean {meant}?" in unknown_loss("dpo", said)


@pytest.mark.parametrize(
    "said",
    [
        "kto_pair",
        "wpo",
        "xpo",
        "rso",
        "ppo",
        "odpo",
        "ldpo",
        "ld_dpo",
        "beta_dpo",
        "caldpo",
        "chi_po",
        "aot_paired",
        "trpo",
    ],
)
def test_a_name_of_another_objective_leads_to_none_of_a_like_spelling(said):
    assert "did you mean" not in unknown_loss("dpo", said)


def test_every_name_of_the_field_leads_to_an_objective_that_exists():
    assert not FIELD_NAMES.keys() & OBJECTIVES["dpo"].keys()
    assert set(FIELD_NAMES.values()) <= OBJECTIVES["dpo"].keys()
