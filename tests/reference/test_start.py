"""The reference `start` is right for every kind of trainable tensors (INV-1, 2, 3, 4, 5, 10)."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from policies import CASES, PROBE, continued_adapter, resolved, take_steps, unfrozen_norms, with_lora
from tether.errors import ConfigError, ReferencePolicyError
from tether.models.structure import adapters_off, trainable_tensors
from tether.reference import (
    SAME,
    FrozenProbe,
    ReferenceSpec,
    compare_with_start,
    require_start_equality,
    resolve,
    why_not_at_start,
)
from tether.reference.guard import require_trainable
from tether.scoring import score
from tiny import VOCABULARY, tiny_model


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(8)
def test_the_reference_is_the_start_and_stays_there(name, checkpointing):
    """INV-1, 2, 4: equal before the first update, and identical after updates, whatever trains."""
    policy = CASES[name].build()
    if checkpointing:
        from functools import partial

        base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        base._set_gradient_checkpointing(True, partial(torch.utils.checkpoint.checkpoint, use_reentrant=False))
    policy.train()
    with torch.no_grad():
        start = score(policy, PROBE).token_logps
    reference = resolved(policy)
    assert reference.identity.method == CASES[name].method
    assert torch.equal(reference.score(PROBE).token_logps, start) or name == "dora"
    torch.testing.assert_close(reference.score(PROBE).token_logps, start, atol=SAME, rtol=0)
    require_start_equality(compare_with_start(policy, reference, score, PROBE, SAME), reference)
    probe = FrozenProbe(reference, PROBE, SAME)
    assert take_steps(policy) > 1e-3
    torch.testing.assert_close(reference.score(PROBE).token_logps, start, atol=SAME, rtol=0)
    assert probe.check(3) <= SAME


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(8)
def test_means_of_one_meaning_agree(name):
    """INV-4: adapter_off (where it may be used), snapshot and a separate copy, before and after updates."""
    policy = CASES[name].build()
    allowed = ["snapshot", "model"] + (["adapter_off"] if CASES[name].method == "adapter_off" else [])
    references = [resolved(policy, method=method) for method in allowed]
    for _ in range(2):
        first, *others = (reference.score(PROBE).token_logps for reference in references)
        for other in others:
            torch.testing.assert_close(other, first, atol=SAME, rtol=0)
        take_steps(policy, 1)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.method == "snapshot"])
def test_adapter_off_is_refused_where_it_would_be_wrong(name):
    """INV-4, negative control: the wrong reference really differs, or drifts, and forcing it is an error."""
    policy = CASES[name].build()
    with pytest.raises(ReferencePolicyError, match="that would not be the start"):
        resolved(policy, method="adapter_off")
    if not isinstance(policy, PeftModel) or name.startswith("continued "):
        return  # the difference of a continued part may lie on tokens that the probe lacks
    start = score(policy, PROBE).token_logps.detach()
    take_steps(policy)
    with torch.no_grad(), adapters_off(policy):
        wrong = score(policy, PROBE).token_logps
    assert (wrong - start).abs().max() > 1e-3


def test_a_pass_leaves_the_policy_bit_for_bit():
    """The swap comes back, also when scoring fails, and modes and trainability stay as they were."""
    for case in CASES.values():
        policy = case.build()
        policy.train()
        reference = resolved(policy)
        take_steps(policy, 1)
        before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        trains = [parameter.requires_grad for parameter in policy.parameters()]
        reference.score(PROBE)
        reference._scorer = None
        with pytest.raises(TypeError):
            reference.score(PROBE)
        assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
        assert trains == [parameter.requires_grad for parameter in policy.parameters()]
        assert policy.training


def test_a_moved_reference_stops_the_run():
    """INV-2, negative control: a frozen tensor that is edited is noticed."""
    policy = with_lora()
    probe = FrozenProbe(resolved(policy), PROBE, SAME)
    with torch.no_grad():
        policy.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ReferencePolicyError, match="The reference moved: at step 7"):
        probe.check(7)


def test_a_policy_away_from_its_start_is_refused():
    """INV-1, negative control: weights edited after the reference was resolved."""
    policy = tiny_model()
    reference = resolved(policy)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.1)
    result = compare_with_start(policy, reference, score, PROBE, SAME)
    assert not result.passed
    cause = why_not_at_start(policy, reference, updates=0)
    with pytest.raises(ReferencePolicyError, match="weights changed after the trainer was made"):
        require_start_equality(result, reference, cause)
    assert "trained already, 3 updates" in why_not_at_start(policy, reference, updates=3)


def test_a_cause_is_told_from_what_was_recorded():
    """An adapter that holds something now, weights that changed, and neither: each has its own words."""
    policy = with_lora()
    reference = resolved(policy)
    assert "a hook, a buffer" in why_not_at_start(policy, reference, updates=0)
    with torch.no_grad():
        next(p for name, p in policy.named_parameters() if "lora_B" in name).add_(0.1)
    cause = why_not_at_start(policy, reference, updates=0)
    assert "already holds something, and it was nothing when the trainer was made" in cause
    assert "lora_B" not in cause
    assert "layers.0.self_attn.q_proj" in cause
    with torch.no_grad():
        policy.get_base_model().lm_head.weight.mul_(1.1)
    assert "weights changed after the trainer was made" in why_not_at_start(policy, reference, updates=0)


def test_an_inference_adapter_says_why_nothing_trains(tmp_path):
    """INV-4, 5: is_trainable=False."""
    with_lora().save_pretrained(tmp_path)
    policy = PeftModel.from_pretrained(tiny_model(vocab_size=VOCABULARY + 1), tmp_path)
    with pytest.raises(ReferencePolicyError, match="is_trainable=True"):
        require_trainable(policy)
    resolved(policy)
    assert not trainable_tensors(policy), "a reference pass must not make an inference adapter trainable"
    base = tiny_model(vocab_size=VOCABULARY + 1)
    require_trainable(PeftModel.from_pretrained(base, tmp_path, is_trainable=True))


def test_base_is_the_model_without_its_adapter():
    plain = score(tiny_model(vocab_size=VOCABULARY + 1), PROBE).token_logps.detach()
    for build in (continued_adapter, unfrozen_norms):
        policy = build()
        reference = resolved(policy, meaning="base")
        take_steps(policy)
        torch.testing.assert_close(reference.score(PROBE).token_logps, plain, atol=SAME, rtol=0)
    assert resolved(continued_adapter(), meaning="base").identity.method == "adapter_off"
    assert resolved(unfrozen_norms(), meaning="base").identity.method == "snapshot"


def test_base_is_refused_where_the_base_was_rewritten():
    for init in ("pissa", "olora"):
        with pytest.raises(ReferencePolicyError, match="wrote into the base"):
            resolved(with_lora(init_lora_weights=init), meaning="base")


def test_another_model_is_the_reference_and_wrong_ones_are_refused():
    """INV-11."""
    from transformers import LlamaForSequenceClassification

    policy, other = tiny_model(), tiny_model(seed=1)
    reference = resolved(policy, meaning="model", model=other, source="other")
    expected = score(other, PROBE).token_logps.detach()
    take_steps(policy)
    torch.testing.assert_close(reference.score(PROBE).token_logps, expected)
    assert not trainable_tensors(other)
    with pytest.raises(ReferencePolicyError, match="shares"):
        resolved(policy, meaning="model", model=policy)
    with pytest.raises(ReferencePolicyError, match="shares"):
        resolved(policy, meaning="model", model=copy.copy(policy))
    with pytest.raises(ReferencePolicyError, match="vocabulary of 50"):
        resolved(policy, meaning="model", model=tiny_model(vocab_size=50))
    with pytest.raises(ReferencePolicyError, match="no language-model head"):
        resolved(policy, meaning="model", model=LlamaForSequenceClassification(policy.config))


def test_a_swap_under_autocast_is_seen_by_both():
    """Autocast keeps cast copies of weights; neither side may score with the other's."""
    policy = tiny_model()
    reference = resolved(policy)
    take_steps(policy, rate=1.0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = score(policy, PROBE).token_logps
        first = reference.score(PROBE).token_logps
        again = score(policy, PROBE).token_logps
        second = reference.score(PROBE).token_logps
    assert torch.equal(expected, again)
    assert torch.equal(first, second)
    assert (expected - first).abs().max() > 1e-2


def test_none_runs_no_model(monkeypatch):
    """INV-9: counted."""
    policy = tiny_model()
    reference = resolve(ReferenceSpec("none"), policy, PROBE, None, None).reference
    monkeypatch.setattr(policy, "forward", None)
    assert reference.score(PROBE) is None


def test_policy_and_reference_are_scored_by_one_function():
    """INV-10: every scoring call goes through the function that was given."""
    calls = []

    def counting(model, batch, *, outputs=()):
        calls.append(model)
        return score(model, batch, outputs=outputs)

    policy = with_lora()
    for method in ("adapter_off", "snapshot", "model"):
        reference = resolve(ReferenceSpec(method=method), policy, PROBE, counting, lambda model: counting).reference
        calls.clear()
        compare_with_start(policy, reference, counting, PROBE, SAME)
        assert len(calls) == 2


def test_meanings_and_means_that_do_not_fit_are_refused():
    """INV-3, 24."""
    with pytest.raises(ConfigError, match="allowed are start, base, model, adapter, none"):
        ReferenceSpec("old")
    with pytest.raises(ConfigError, match="cannot compute the meaning 'base'"):
        ReferenceSpec("base", "model")
    with pytest.raises(ConfigError, match="no model was given"):
        resolved(tiny_model(), meaning="model")


def test_identity_says_what_the_reference_is():
    """INV-3: the hash is of the content, so that a random adapter does not change what is under it."""
    first, second = resolved(with_lora()).identity, resolved(with_lora(r=8)).identity
    assert first == second
    assert first.fingerprint.startswith("b2:")
    assert first.meaning == "start"
    edited = with_lora()
    with torch.no_grad():
        edited.get_base_model().lm_head.weight[0, 0] += 1e-3
    assert resolved(edited).identity.fingerprint != first.fingerprint
    assert resolved(continued_adapter()).identity.fingerprint != first.fingerprint
