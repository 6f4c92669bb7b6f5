"""Another model, another adapter, a moving reference: each is what it says, and stays or moves as it says."""

from __future__ import annotations

import copy
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import get_peft_model

from policies import CASES, PROBE, continued_adapter, lora, resolved, take_steps, unfrozen_norms, with_lora
from tether.errors import ConfigError, ReferencePolicyError
from tether.models.structure import adapter_on, trainable_tensors
from tether.reference import SAME, FrozenProbe, ReferenceSpec, Sync, refuse_other_tokenizer, resolve
from tether.scoring import score
from tiny import VOCABULARY, tiny_model, tiny_tokenizer


def logps(model) -> torch.Tensor:
    with torch.no_grad():
        return score(model, PROBE).token_logps


def with_sft(policy=None, *, trains="default"):
    """A policy with a learnt adapter `sft` beside the one in training."""
    policy = with_lora() if policy is None else policy
    policy.add_adapter("sft", lora(r=2))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B.sft" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    policy.set_adapter(trains)
    for name, parameter in policy.named_parameters():
        if ".sft." in name or ".default." in name:
            parameter.requires_grad_(f".{trains}." in name)
    return policy


def sft_alone() -> torch.Tensor:
    """The log-probs of the base with the adapter `sft`, from a model that has no other."""
    policy = with_sft()
    policy.set_adapter("sft")
    policy.delete_adapter("default")
    return logps(policy)


ADAPTERS = {
    "frozen beside another": (lambda: with_sft(), "adapter_on"),
    "the one in training": (lambda: with_sft(trains="sft"), "snapshot"),
    "norms train too": (lambda: with_sft(unfrozen_norms()), "snapshot"),
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("method", [None, "snapshot", "model"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_the_reference_and_stays(name, method):
    """INV-2, 3: the base with that adapter alone, whatever trains; one fingerprint for all its methods."""
    build, chosen = ADAPTERS[name]
    policy, expected = build(), sft_alone()
    trains = set(trainable_tensors(policy))
    reference = resolved(policy, meaning="adapter", adapter="sft", method=method)
    assert reference.identity.method == (method or chosen)
    torch.testing.assert_close(reference.score(PROBE).token_logps, expected, atol=SAME, rtol=0)
    assert (logps(policy) - expected).abs().max() > 1e-2 or name == "the one in training"
    assert take_steps(policy) > 1e-3
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    torch.testing.assert_close(reference.score(PROBE).token_logps, expected, atol=SAME, rtol=0)
    assert set(trainable_tensors(policy)) == trains, "the reference trains nothing and freezes nothing"
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())
    assert reference.identity.fingerprint == resolved(with_sft(), meaning="adapter", adapter="sft").identity.fingerprint


def test_adapter_on_is_refused_where_it_would_move():
    """INV-4, negative control: forced, it is an error; and it really would move."""
    policy = with_sft(trains="sft")
    with pytest.raises(ReferencePolicyError, match="that it computes with would train"):
        resolved(policy, meaning="adapter", adapter="sft", method="adapter_on")
    start = logps(policy)
    take_steps(policy)
    with adapter_on(policy, "sft"):
        assert (logps(policy) - start).abs().max() > 1e-3


def test_an_adapter_is_known_by_its_content():
    """INV-3: its name and its neighbours do not matter, its values do."""
    first = resolved(with_sft(), meaning="adapter", adapter="sft").identity
    renamed = with_lora()
    renamed.add_adapter("other", lora(r=2))
    sft = {name: value for name, value in with_sft().named_parameters() if ".sft." in name}
    with torch.no_grad():
        for name, parameter in renamed.named_parameters():
            if ".other." in name:
                parameter.copy_(sft[name.replace(".other.", ".sft.")])
    second = resolved(renamed, meaning="adapter", adapter="other").identity
    assert first.fingerprint == second.fingerprint
    with torch.no_grad():
        next(value for name, value in renamed.named_parameters() if "lora_B.other" in name).add_(1e-3)
    assert resolved(renamed, meaning="adapter", adapter="other").identity.fingerprint != first.fingerprint


def test_an_adapter_that_is_not_there_is_named():
    for policy in (with_lora(), tiny_model()):
        with pytest.raises(ConfigError, match="'sft' is not loaded on the policy; loaded are"):
            resolved(policy, meaning="adapter", adapter="sft")
    with pytest.raises(ConfigError, match="no adapter 'sft'"), adapter_on(tiny_model(), "sft"):
        pass


def test_one_start_has_one_fingerprint_under_every_means():
    """INV-8: a run may be resumed under another method of the same start."""
    for name, case in CASES.items():
        policy = case.build()
        prints = {resolved(policy, method=method).identity.fingerprint for method in (None, "snapshot", "model")}
        assert len(prints) == 1, name
    plain = tiny_model(vocab_size=VOCABULARY + 1)
    assert resolved(with_lora()).identity.fingerprint == resolved(plain).identity.fingerprint


@pytest.mark.sweep(2)
@pytest.mark.parametrize("build", [tiny_model, with_lora, continued_adapter, unfrozen_norms])
@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_a_reference_moves_by_the_formula(build, alpha):
    """TR-DPO, soft and hard: alpha * policy + (1 - alpha) * reference for each trainable tensor, twice."""
    policy = build()
    reference = resolved(policy, sync=Sync(1, alpha))
    assert reference.identity.method == "snapshot"
    assert reference.identity.sync == f"every 1 steps {alpha:g} of the policy"
    twin = copy.deepcopy(policy)
    for _ in range(2):
        take_steps(policy, 1)
        with torch.no_grad():
            mine = trainable_tensors(policy)
            for name, kept in trainable_tensors(twin).items():
                kept.copy_(alpha * mine[name] + (1 - alpha) * kept)
        reference.move(alpha)
        torch.testing.assert_close(reference.score(PROBE).token_logps, logps(twin), atol=1e-5, rtol=0)
    assert (reference.score(PROBE).token_logps - logps(policy)).abs().max() < 1e-5 or alpha < 1


def test_a_move_is_what_trl_does():
    """Against TRL's own callback, for full fine-tuning, to the bit."""
    from trl.trainer.callbacks import SyncRefModelCallback

    policy = tiny_model()
    reference, theirs = resolved(policy, sync=Sync(1, 0.6)), tiny_model()
    for _ in range(3):
        take_steps(policy, 1)
        reference.move(0.6)
        SyncRefModelCallback._sync_target_model(policy, theirs, 0.6)
    kept = reference.state()
    assert all(torch.equal(kept[name], value) for name, value in theirs.named_parameters())


def test_the_frozen_probe_follows_a_moving_reference():
    """Between two moves nothing may change; at a move the probe takes the new values."""
    policy = tiny_model()
    reference = resolved(policy, sync=Sync(2, 0.5))
    probe = FrozenProbe(reference, PROBE, SAME)
    for step in (1, 2, 3):
        take_steps(policy, 1)
        assert probe.check(step) <= SAME
        probe.follow(step)
        assert reference.moves == step // 2
        assert probe.check(step) <= SAME
    reference.move(0.5)
    with pytest.raises(ReferencePolicyError, match="The reference moved"):
        probe.check(4)


@pytest.mark.parametrize(
    "declared",
    [
        {"meaning": "base"},
        {"method": "adapter_off"},
        {"method": "model"},
        {"meaning": "adapter", "adapter": "sft", "method": "adapter_on"},
        {"meaning": "none"},
    ],
)
def test_what_cannot_move_is_refused(declared):
    with pytest.raises(ConfigError, match="What can move is a snapshot"):
        ReferenceSpec(**declared, sync=Sync())


@pytest.mark.parametrize(("steps", "alpha"), [(0, 0.6), (5, 0.0), (5, 1.5)])
def test_a_sync_outside_its_range_is_refused(steps, alpha):
    with pytest.raises(ConfigError, match="it must be"):
        Sync(steps, alpha)


def test_the_line_says_what_and_why():
    """INV-3: one line with method, reason and proof."""
    lines = {
        "lora": "reference: start, by adapter_off: 8 trainable tensors, all inside adapter 'default'; "
        "start equality 0.0e+00 nats on 4 rows",
        "full": "MiB), because the policy has no adapter; start equality 0.0e+00 nats on 4 rows",
        "unfrozen norms": "outside the adapter would train; start equality 0.0e+00 nats",
    }
    for name, words in lines.items():
        policy = CASES[name].build()
        assert words in resolve(ReferenceSpec(), policy, PROBE, score, lambda model: score).line
    line = resolve(ReferenceSpec(keep="host"), tiny_model(), PROBE, score, lambda model: score).line
    assert "in host memory, as forced" in line


def test_a_large_snapshot_goes_to_the_host(monkeypatch):
    """By free memory: values, gradients and two moments of the trainable tensors have to fit."""
    module = sys.modules["tether.reference.resolve"]
    policy = tiny_model()
    size = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())
    for free, words in ((6 * size, "trainable tensors kept"), (4 * size, "in host memory, as")):
        monkeypatch.setattr(module, "free_memory", lambda device, free=free: free)
        found = resolve(ReferenceSpec(), policy, PROBE, score, lambda model: score)
        assert words in found.line
        assert ("host" in found.line) == (found.reference._keep == "host")
        assert torch.equal(found.reference.score(PROBE).token_logps, logps(policy))


def test_an_interrupted_swap_gives_the_policy_back(monkeypatch):
    """An error in the middle of the exchange, and one inside the pass: bit for bit, and the reference too."""
    policy = tiny_model()
    reference = resolved(policy)
    expected = reference.score(PROBE).token_logps
    take_steps(policy)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    copying = torch.Tensor.copy_
    for failing in (1, 2, 5, 8):
        count = iter(range(1, 100))

        def broken(self, source, *args, count=count, failing=failing):
            if next(count) == failing:
                raise KeyboardInterrupt
            return copying(self, source, *args)

        monkeypatch.setattr(torch.Tensor, "copy_", broken)
        with pytest.raises(KeyboardInterrupt):
            reference.score(PROBE)
        monkeypatch.undo()
        assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items()), failing
        assert torch.equal(reference.score(PROBE).token_logps, expected), failing


def test_a_policy_rebuilt_after_the_trainer_was_made_is_named():
    policy = with_lora()
    reference = resolved(policy, method="snapshot")
    policy.delete_adapter("default")
    with pytest.raises(ReferencePolicyError, match="no longer in the policy"):
        reference.score(PROBE)


def test_another_tokenizer_is_refused():
    """INV-11: the same size of vocabulary, other tokens behind the ids."""
    ours = tiny_tokenizer()
    refuse_other_tokenizer(ours, tiny_tokenizer())
    longer = tiny_tokenizer()
    longer.add_tokens(["<tool>"])
    refuse_other_tokenizer(ours, longer)
    other = copy.deepcopy(ours)
    words = {token: number for token, number in ours.get_vocab().items()}
    first, second = list(words)[10], list(words)[11]
    words[first], words[second] = words[second], words[first]
    other.get_vocab = lambda: words  # type: ignore[method-assign]
    with pytest.raises(ReferencePolicyError, match="2 token ids stand for other tokens"):
        refuse_other_tokenizer(ours, other)


def test_a_served_start_and_a_second_model_are_told_apart_from_the_policy():
    """INV-11: a copy that shares storage with what trains."""
    policy = with_lora()
    with pytest.raises(ReferencePolicyError, match="shares"):
        resolved(policy, meaning="model", model=policy.get_base_model(), source="base")
    frozen = get_peft_model(tiny_model(vocab_size=VOCABULARY + 1), lora())
    assert resolved(policy, meaning="model", model=frozen.get_base_model()).identity.meaning == "model"


@pytest.mark.parametrize("meaning", ["base", "adapter"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_means_of_base_and_of_an_adapter_agree(layout, meaning):
    """INV-4, 10: by switching, by snapshot, and by a second model or a server, before and after updates."""
    policy, scorer = with_sft(), partial(score, layout=layout)
    server_model = with_sft()
    server_model.set_adapter("sft")
    expected = logps(tiny_model(vocab_size=VOCABULARY + 1)) if meaning == "base" else logps(server_model)
    spec = partial(ReferenceSpec, meaning, adapter="sft" if meaning == "adapter" else None)
    choices = ["adapter_off", "snapshot"] if meaning == "base" else ["adapter_on", "snapshot", "model"]
    references = [resolve(spec(method), policy, PROBE, scorer, lambda _: scorer).reference for method in choices]
    for _ in range(2):
        for reference in references:
            torch.testing.assert_close(reference.score(PROBE).token_logps, expected, atol=SAME, rtol=0)
        take_steps(policy, 1)
    assert len({reference.identity.fingerprint for reference in references}) == 1


def test_shards_on_a_disk_are_refused():
    """DeepSpeed's stage 3 with parameters on a disk: an exchange would reach a copy that nothing computes with."""
    policy = tiny_model()
    reference = resolved(policy)
    away, weight = SimpleNamespace(name="NOT_AVAILABLE"), cast(Any, policy.lm_head.weight)
    weight.ds_id, weight.ds_status, weight.ds_tensor = 0, away, SimpleNamespace(status=away)
    with pytest.raises(ReferencePolicyError, match="keeps the policy's shards on a disk"):
        reference.score(PROBE)
