"""A second model as the start of a moving reference (TR-DPO): it moves by the formula, resumes, or is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from policies import CASES, PROBE, continued_adapter, lora, resolved, take_steps, unfrozen_norms, with_lora
from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError, ReferencePolicyError
from tether.models.structure import trainable_tensors
from tether.reference import SAME, FrozenProbe, ReferenceSpec, Sync, resolve
from tether.reference.methods.moving import policy_weights
from tether.scoring import score
from tiny import VOCABULARY, pair_rows, tiny_model, tiny_tokenizer

WIDE = {"vocab_size": VOCABULARY + 1}
TOKENIZER = tiny_tokenizer()
ROWS = Dataset.from_list(pair_rows(12))


def logps(model) -> torch.Tensor:
    with torch.no_grad():
        return score(model, PROBE).token_logps


def moving(policy, model, alpha=0.6, steps=1):
    return resolved(policy, meaning="model", model=model, source="other", sync=Sync(steps, alpha))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("alpha", [0.6, 1.0])
@pytest.mark.parametrize(
    ("build", "changes"),
    [(tiny_model, {}), (with_lora, WIDE), (continued_adapter, WIDE), (unfrozen_norms, WIDE)],
    ids=["full", "lora", "continued", "norms"],
)
def test_a_second_model_moves_by_the_formula(build, changes, alpha):
    """TR-DPO, soft and hard, twice: the plain weights of both sides, an adapter of the policy merged."""
    policy, twin = build(), tiny_model(seed=7, **changes)
    reference = moving(policy, tiny_model(seed=7, **changes), alpha)
    assert (reference.identity.method, reference.identity.sync) == ("model", f"every 1 steps {alpha:g} of the policy")
    torch.testing.assert_close(reference.score(PROBE).token_logps, logps(twin), atol=SAME, rtol=0)
    for _ in range(2):
        take_steps(policy, 1)
        whole = copy.deepcopy(policy)
        plain = dict((whole.merge_and_unload() if hasattr(whole, "merge_and_unload") else whole).named_parameters())
        with torch.no_grad():
            for name, kept in twin.named_parameters():
                kept.copy_(alpha * plain[name] + (1 - alpha) * kept)
        before = {name: value.clone() for name, value in policy.state_dict().items()}
        reference.move(alpha)
        assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
        torch.testing.assert_close(reference.score(PROBE).token_logps, logps(twin), atol=SAME, rtol=0)
    distance = (reference.score(PROBE).token_logps - logps(policy)).abs().max()
    assert distance < 1e-4 if alpha == 1 else distance > 1e-2


def test_a_second_model_moves_as_in_trl():
    """Against TRL's own callback, for full fine-tuning, to the bit."""
    from trl.trainer.callbacks import SyncRefModelCallback

    policy, theirs = tiny_model(), tiny_model(seed=3)
    reference = moving(policy, tiny_model(seed=3))
    for _ in range(3):
        take_steps(policy, 1)
        reference.move(0.6)
        SyncRefModelCallback._sync_target_model(policy, theirs, 0.6)
    kept = reference.state()
    assert kept.keys() == dict(theirs.named_parameters()).keys()
    assert all(torch.equal(kept[name], value) for name, value in theirs.named_parameters())


MERGEABLE = [name for name in CASES if name != "continued adapter on the embedding"]


@pytest.mark.sweep(7)
@pytest.mark.parametrize("name", MERGEABLE)
def test_the_plain_weights_compute_what_the_policy_computes(name):
    """The oracle of the merged weights, over every kind of adapter: a plain model that holds them."""
    policy = CASES[name].build()
    take_steps(policy, 1)
    plain = copy.deepcopy(policy)
    plain = plain.unload() if hasattr(plain, "unload") else plain
    weights = dict(policy_weights(policy))
    assert weights.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logps(plain), logps(policy), atol=2e-4, rtol=0)
    under = dict(policy_weights(policy, merge=False))
    assert {key: value.shape for key, value in under.items()} == {key: value.shape for key, value in weights.items()}


def test_a_reference_in_half_precision_moves_with_one_rounding():
    policy, reference = tiny_model(), moving(tiny_model(), tiny_model(seed=3).bfloat16(), 0.1)
    exact = {name: value.detach().float() for name, value in tiny_model(seed=3).bfloat16().named_parameters()}
    reference.move(0.1)
    for name, value in reference.state().items():
        assert value.dtype == torch.bfloat16
        right = 0.1 * dict(policy.named_parameters())[name].detach() + 0.9 * exact[name]
        torch.testing.assert_close(value, right.bfloat16(), rtol=0.01, atol=1e-6)


def test_the_frozen_probe_follows_a_second_model_that_moves():
    """INV-2: between two moves nothing may change."""
    policy, model = tiny_model(), tiny_model(seed=3)
    reference = moving(policy, model, 0.5, steps=2)
    probe = FrozenProbe(reference, PROBE, SAME)
    for step in (1, 2, 3):
        take_steps(policy, 1)
        assert probe.check(step) <= SAME
        probe.follow(step)
        assert reference.moves == step // 2
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    with pytest.raises(ReferencePolicyError, match="The reference moved"):
        probe.check(4)


def tied_with_adapter():
    return get_peft_model(tiny_model(tie_word_embeddings=True), lora(target_modules=["q_proj", "embed_tokens"]))


REFUSED = {
    "more layers": (tiny_model, lambda: tiny_model(num_hidden_layers=3), "num_hidden_layers is 3 there and 2"),
    "other widths": (tiny_model, lambda: tiny_model(intermediate_size=48), "intermediate_size is 48 there"),
    "another architecture": (tiny_model, lambda: tiny_model("mistral_window"), "it is a MistralForCausalLM"),
    "other positions": (tiny_model, lambda: tiny_model(rope_theta=5e5), "rope_"),
    "its own adapter": (with_lora, with_lora, "has an adapter of its own"),
    "a tied weight under an adapter": (tied_with_adapter, lambda: tiny_model(tie_word_embeddings=True), "is tied to"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_mixed_is_refused_and_says_why(name):
    """INV-11: and without `sync` the same model is a reference, so that it is the mixing that is refused."""
    build, other, words = REFUSED[name]
    with pytest.raises(ReferencePolicyError, match=words):
        moving(build(), other())
    assert resolved(build(), meaning="model", model=other()).identity.meaning == "model"


def test_tensors_that_differ_are_named():
    """The last line of defence: configurations that say the same over weights that are not."""
    odd = tiny_model()
    odd.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 60, bias=False)
    with pytest.raises(ReferencePolicyError, match=r"1 tensors differ, such as 'model.layers.0.mlp.up_proj.weight'"):
        moving(tiny_model(), odd)


def test_entries_of_a_configuration_that_nothing_reads_do_not_matter():
    other = tiny_model(seed=2, max_position_embeddings=512, **{"transformers.js_config": {"dtype": "q4"}})
    assert moving(tiny_model(), other).identity.sync == "every 1 steps 0.6 of the policy"


def test_an_adapter_moves_when_it_is_the_one_in_training():
    """Then it is a snapshot that moves; factors of two different adapters stand for nothing when they are mixed."""
    policy = continued_adapter()
    reference = resolved(policy, meaning="adapter", adapter="default", sync=Sync(1, 0.5))
    assert (reference.identity.method, reference.identity.sync) == ("snapshot", "every 1 steps 0.5 of the policy")
    kept = {name: value.clone() for name, value in trainable_tensors(policy).items()}
    take_steps(policy, 1)
    reference.move(0.5)
    now = trainable_tensors(policy)
    assert all(torch.allclose(value, 0.5 * (kept[name] + now[name])) for name, value in reference.state().items())
    policy.add_adapter("sft", lora(r=2))
    with pytest.raises(ConfigError, match="factors of two adapters stand for nothing"):
        resolved(policy, meaning="adapter", adapter="sft", sync=Sync(1, 0.5))


def test_the_line_says_that_it_moves():
    spec = ReferenceSpec("model", model=tiny_model(seed=1), source="sft", sync=Sync(8, 0.5))
    line = resolve(spec, tiny_model(), PROBE, score, lambda model: score).line
    assert line == "reference: model, by model: sft (float32, cpu); it moves every 8 steps 0.5 of the policy"


# -- in a run ----------------------------------------------------------------------------------------------------------


def policy_of(seed=0):
    return tiny_model(seed=seed, vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2)


def run(folder, resume=None, *, adapter=None, ref_model=5, **changes):
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1, "sync_ref_model": True, **changes}
    if settings["sync_ref_model"]:
        settings = {"ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5, **settings}
    trainer = DPOTrainer(
        model=policy_of(),
        ref_model=None if ref_model is None else policy_of(ref_model),
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=False,
            reference_check_steps=1,
            **settings,
        ),
        train_dataset=ROWS,
        processing_class=TOKENIZER,
        peft_config=adapter,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def adapter():
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.slow
@pytest.mark.parametrize("other", [5, None], ids=["second model", "snapshot"])
@pytest.mark.parametrize("kind", [None, adapter], ids=["full", "lora"])
def test_a_moved_reference_survives_two_interruptions(kind, other, tmp_path):
    """INV-7: resumed at 4, after the move at 3, and again from what that run saved before the next move at 6."""

    def start(name, resume=None, **changes):
        return run(tmp_path / name, resume, adapter=kind and kind(), ref_model=other, **changes)

    whole = start("whole")
    start("again", str(tmp_path / "whole" / "checkpoint-4"), max_steps=5)
    resumed = start("third", str(tmp_path / "again" / "checkpoint-5"))
    assert losses(resumed) == losses(whole)
    for (name, mine), theirs in zip(whole.policy.named_parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    ours, theirs = (one.run.reference.score(one.run.probe).token_logps for one in (whole, resumed))
    assert torch.equal(ours, theirs)
    assert resumed.run.reference.moves == 3
    still = start("still", sync_ref_model=False)
    assert losses(still)[:3] == losses(whole)[:3]
    assert losses(still)[4:] != losses(whole)[4:]
    with pytest.raises(ReferencePolicyError, match="another reference"):
        start("wrong", str(tmp_path / "whole" / "checkpoint-4"), sync_ref_model=False)


def test_a_checkpoint_without_its_moved_reference_is_refused(tmp_path):
    """INV-8: the record counts the moves, so that lost tensors are noticed."""
    run(tmp_path, max_steps=4)
    checkpoint = tmp_path / "checkpoint-4"
    assert json.loads((checkpoint / "reference.json").read_text())["moves"] == 1
    assert not (tmp_path / "checkpoint-2" / "reference.safetensors").exists()
    (checkpoint / "reference.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"checkpoint-4 lacks reference\.safetensors"):
        run(tmp_path / "again", str(checkpoint))
    manifest = json.loads((checkpoint / "manifest.json").read_text())  # as if it had never been written
    del manifest["files"]["reference.safetensors"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ReferencePolicyError, match=r"had moved 1 times, but reference\.safetensors"):
        run(tmp_path / "again", str(checkpoint))


def test_another_start_of_a_moving_reference_is_refused(tmp_path):
    """INV-8: it is known by where it began."""
    run(tmp_path, max_steps=4)
    with pytest.raises(ReferencePolicyError, match="Resuming with another reference"):
        run(tmp_path / "again", str(tmp_path / "checkpoint-4"), ref_model=6)
