"""The contract of the losses of single judged completions, and of the pairing for KTO's estimate."""

from __future__ import annotations

import math

import pytest
import torch

import streams
from tether.data import prepare
from tether.errors import DataError
from tether.objectives import OBJECTIVES
from tether.objectives.unpaired_loss import is_balanced, suggested_weights, unpaired_loss
from tether.training.algorithms.kto_mismatch import mismatched_rows, with_mismatched
from tether.types import Scores
from tiny import tiny_tokenizer

ANCHORED = ("kto", "bco")
UNPAIRED = OBJECTIVES["kto"]
LOGRATIOS = [1.5, -2.0, 0.0, 0.7, -30.0, 4.0]
LABELS = [True, True, False, False, True, False]


def formula(name, logratio, desirable, baseline, beta):
    """The papers' formulae once more, in plain Python."""
    logistic = 1 / (1 + math.exp(-beta * (logratio - (baseline if name in ANCHORED else 0.0))))
    right = logistic if desirable else 1 - logistic
    return -math.log(right) if name == "bco" else 1 - right


def losses(name, logratios, labels, baseline=0.4, **options):
    anchored = (baseline,) if name in ANCHORED else ()
    return UNPAIRED[name](torch.as_tensor(logratios), torch.as_tensor(labels), *anchored, **options)


@pytest.mark.parametrize("name", UNPAIRED)
def test_values_are_the_formulas(name):
    """INV-23: in float64, with weights of the two classes."""
    options = {"beta": 0.3, "desirable_weight": 2.0, "undesirable_weight": 0.5}
    found = losses(name, torch.tensor(LOGRATIOS, dtype=torch.float64), LABELS, **options)
    expected = [
        formula(name, r, label, 0.4, 0.3) * (2.0 if label else 0.5) for r, label in zip(LOGRATIOS, LABELS, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", UNPAIRED)
def test_gradients_are_right(name):
    """INV-23."""
    logratios = torch.tensor(LOGRATIOS, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(LABELS)
    assert torch.autograd.gradcheck(lambda r: losses(name, r, labels, beta=0.3), logratios)


@pytest.mark.parametrize("name", UNPAIRED)
@pytest.mark.parametrize("value", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("labels", [[True], [False], [True, True], [True, False]])
def test_extremes_ties_and_one_class_are_finite(name, value, labels):
    """INV-23, 41: value and gradient."""
    logratios = torch.full((len(labels),), value, requires_grad=True)
    found = losses(name, logratios, torch.tensor(labels), beta=1.0)
    found.sum().backward()
    assert found.isfinite().all()
    assert logratios.grad.isfinite().all()
    assert (found >= 0).all()


@pytest.mark.parametrize("name", UNPAIRED)
def test_rows_are_judged_alone(name):
    """A permutation of the rows permutes the losses, and flipping label and sign leaves them as they are."""
    logratios, labels = torch.tensor(LOGRATIOS), torch.tensor(LABELS)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(losses(name, logratios, labels)[order], losses(name, logratios[order], labels[order]))
    torch.testing.assert_close(
        losses(name, logratios, labels, baseline=0.0), losses(name, -logratios, ~labels, baseline=0.0)
    )


@pytest.mark.parametrize("name", UNPAIRED)
def test_the_direction_of_a_step(name):
    """Less loss for a likelier desirable completion, and for a less likely undesirable one."""
    logratios = torch.zeros(2, requires_grad=True)
    losses(name, logratios, torch.tensor([True, False])).sum().backward()
    assert logratios.grad[0] < 0 < logratios.grad[1]


def scores(logps, lengths):
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Scores(torch.tensor(logps), index, len(lengths))


def test_only_the_first_branch_is_judged():
    """With a second completion for the estimate, losses and metrics are those of the first alone."""
    policy = scores([-1.0, -2.0, -9.0, -3.0, -8.0, -8.5], [2, 1, 1, 2])
    reference = scores([-1.5, -2.0, -1.0, -2.0, -1.0, -1.0], [2, 1, 1, 2])
    alone = [scores([-1.0, -2.0, -3.0], [2, 1]), scores([-1.5, -2.0, -2.0], [2, 1])]
    labels = torch.tensor([True, False])
    options = {"loss": "kto", "baseline": 0.2, "beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 3.0}
    found = unpaired_loss(policy, reference, labels, branches=2, **options)
    expected = unpaired_loss(*alone, labels, **options)
    assert torch.equal(found.values(), expected.values())
    assert found.metrics == expected.metrics
    assert found.metrics["rewards/chosen"][0].item() == pytest.approx(0.25)
    assert found.metrics["logps/rejected"][0].item() == pytest.approx(-3.0)


def test_a_class_that_is_not_there_counts_nothing():
    """INV-41."""
    output = unpaired_loss(
        scores([-1.0], [1]), scores([-1.0], [1]), torch.tensor([True]), loss="kto", baseline=0.0, beta=0.1
    )
    assert output.metrics["rewards/rejected"][1].item() == 0
    assert output.metrics["rewards/chosen"][1].item() == 1


@pytest.mark.parametrize(("desirable", "undesirable"), [(30, 60), (90, 10), (1, 1)])
def test_suggested_weights_balance(desirable, undesirable):
    """Eq. 8 of the KTO paper: desirable over undesirable weight times count from 1 to 4/3, at both ends."""
    (low, high), (other_low, other_high) = suggested_weights(desirable, undesirable)
    for weight, ratio in ((low, 1.0), (high, 4 / 3)):
        assert weight * desirable / undesirable == pytest.approx(ratio)
        assert is_balanced(desirable, undesirable, weight, 1.0)
    for weight, ratio in ((other_high, 1.0), (other_low, 4 / 3)):
        assert desirable / (weight * undesirable) == pytest.approx(ratio)
        assert is_balanced(desirable, undesirable, 1.0, weight)
    assert not is_balanced(desirable, undesirable, 1.5 * high, 1.0)
    assert not is_balanced(desirable, undesirable, 0.9 * low, 1.0)
    assert suggested_weights(desirable, 0) is None
    assert is_balanced(0, undesirable, 1.0, 1.0)


def as_bytes(values):
    return [bytes([value]) for value in values]


@pytest.mark.parametrize("seed", range(20))
def test_no_row_is_its_own_partner(seed):
    """INV-41: neither by row nor by content, whatever repeats; its own prompt only where there is no other choice."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, count):
        return torch.randint(0, high, (count,), generator=generator).tolist()

    for rows in (2, 3, 7, 40):
        prompts, completions = draw(1 + seed % 5, rows), [0, 1, *draw(2 + seed % 3, rows - 2)]
        others, own_prompts = mismatched_rows(as_bytes(prompts), as_bytes(completions))
        shared = 0
        for i, j in enumerate(others.tolist()):
            assert completions[j] != completions[i]
            if prompts[j] == prompts[i]:
                shared += 1
                assert all(prompts[k] == prompts[i] or completions[k] == completions[i] for k in range(rows)), (
                    "there was a row with another prompt"
                )
        assert shared == own_prompts


def test_each_completion_is_used_once():
    """Rows of their own prompts, and pairs read as two rows: the partners are a permutation of the rows."""
    distinct = mismatched_rows(as_bytes(range(9)), as_bytes(range(9)))[0].tolist()
    assert distinct == [8, 0, 1, 2, 3, 4, 5, 6, 7]
    for prompts in ([i // 2 for i in range(10)], [i % 5 for i in range(10)]):
        others = mismatched_rows(as_bytes(prompts), as_bytes(range(10)))[0].tolist()
        assert sorted(others) == list(range(10))
        assert all(prompts[i] != prompts[j] for i, j in enumerate(others))


def test_a_far_partner_is_found():
    """The search goes on where thousands of rows around are no partners."""
    prompts, completions = [b"p"] * 5000, [b"c"] * 5000
    prompts[10], completions[10] = b"q", b"d"
    others, own_prompts = mismatched_rows(prompts, completions)
    assert set(others.tolist()) - {10} == {others[10]}
    assert own_prompts == 0


def test_one_completion_everywhere_is_refused():
    with pytest.raises(DataError, match="All 3 rows have the same completion"):
        mismatched_rows(as_bytes([1, 2, 3]), as_bytes([1, 1, 1]))


def test_other_completions_come_of_the_same_thousand_rows_or_else_of_those_before(monkeypatch):
    """INV-34, 41: what a row is paired with depends on rows near it alone, so that a stream has it, too."""
    streams.small_chunks(monkeypatch)
    rows = [{"prompt": f"film {i}", "completion": f" {i} stars", "label": i % 2 == 0} for i in range(31)]
    rows[20:30] = [{**row, "completion": " the same"} for row in rows[20:30]]
    prepared = prepare(rows, tiny_tokenizer(), max_length=64, kind="unpaired")
    own = [ids for (ids,) in prepared.dataset["completion_ids"]]
    found = with_mismatched(prepared, 64).dataset["completion_ids"][:]
    assert [first for first, _ in found] == own
    places = [own.index(second) for _, second in found]
    assert places[:20] == [9, *range(9), 19, *range(10, 19)]
    # The third block has one completion, and the last block one row: their others are of the block before.
    assert all(10 <= place < 20 for place in places[20:30])
    assert places[30] == 20
    assert (
        with_mismatched(prepare(rows[:25], tiny_tokenizer(), max_length=64, kind="unpaired"), 64).dataset[
            "completion_ids"
        ][:20]
        == found[:20]
    )
