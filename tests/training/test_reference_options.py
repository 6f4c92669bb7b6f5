"""The reference as a trainer is told it: every option, resumption, and what is refused (INV-7, 8, 9, 11, 28)."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from completions_server import serving
from tether import DPOConfig, DPOTrainer
from tether.errors import ConfigError, ReferencePolicyError, TetherError
from tether.reference import SAME, TrainingProof
from tether.training.algorithms.base import Algorithm
from tether.training.callbacks import GuardCallback
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

ROWS = Dataset.from_list(pair_rows(12))
TOKENIZER = tiny_tokenizer()
SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    **QUIET,
    "gradient_checkpointing": False,
}


def policy(seed=0):
    return tiny_model(seed=seed, vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2)


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def learnt(model, name="default", seed=0):
    """Give an adapter something that it has learnt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def trainer(folder, model, **arguments):
    keywords = {name: arguments.pop(name) for name in list(arguments) if name in ("ref_model", "peft_config")}
    return DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(folder), **{**SETTINGS, **arguments}),
        train_dataset=ROWS,
        processing_class=TOKENIZER,
        **keywords,
    )


def losses(run):
    return [log["loss"] for log in run.state.log_history if "loss" in log]


def alone(run, model):
    """The log-probs of the run's probe under another model, computed apart."""
    from tether.scoring import score

    with torch.no_grad():
        return score(model.eval(), run.run.probe).token_logps


@pytest.fixture
def sft(tmp_path):
    """A folder with the adapter that supervised fine-tuning left, and the model with it."""
    model = learnt(get_peft_model(policy(), lora(r=2)))
    model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft", model


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", ["new adapter", "continued adapter", "full"])
def test_an_adapter_folder_is_the_reference(kind, sft, tmp_path, caplog):
    """One resident model where the policy has adapters, a second one where it has none; excluded from training."""
    folder, expected = sft
    arguments = {}
    model = policy()
    if kind == "new adapter":
        arguments["peft_config"] = lora()
    if kind == "continued adapter":
        model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    with caplog.at_level(logging.INFO, "tether"):
        run = trainer(tmp_path / "run", model, reference_adapter=str(folder), **arguments)
    method = "model" if kind == "full" else "adapter_on"
    assert run.run.reference.identity.method == method
    reference = run.run.reference.score(run.run.probe).token_logps
    torch.testing.assert_close(reference, alone(run, expected), atol=SAME, rtol=0)
    trains = {name for name, parameter in run.policy.named_parameters() if parameter.requires_grad}
    assert trains
    assert not any(".reference." in name for name in trains)
    run.train()
    assert torch.equal(run.run.reference.score(run.run.probe).token_logps, reference)
    # A new adapter starts at the base, so that its margins are not zero; a continued one starts at the reference.
    assert (losses(run)[0] == pytest.approx(math.log(2), abs=1e-5)) == (kind == "continued adapter")


def test_a_loaded_adapter_is_the_reference_by_its_name(sft, tmp_path):
    folder, expected = sft
    model = PeftModel.from_pretrained(policy(), folder, adapter_name="sft")
    model.add_adapter("mine", lora())
    model.set_adapter("mine")
    run = trainer(tmp_path / "run", model, reference_adapter="sft")
    torch.testing.assert_close(
        run.run.reference.score(run.run.probe).token_logps, alone_with(model, "sft", run), atol=0, rtol=0
    )
    torch.testing.assert_close(
        run.run.reference.score(run.run.probe).token_logps, alone(run, expected), atol=SAME, rtol=0
    )
    run.train()


def alone_with(model, name, run):
    from tether.models.structure import adapter_on

    with adapter_on(model, name):
        return alone(run, model)


def test_an_explicit_separate_reference_beside_an_adapter(tmp_path):
    """Axolotl's `rl_adapter_ref_model: true`: a copy of its own, as ref_model or as forced method."""
    run = trainer(tmp_path, policy(), peft_config=lora(), ref_model=policy())
    assert run.run.reference.identity.method == "model"
    forced = trainer(tmp_path, policy(), peft_config=lora(), reference_method="model")
    assert forced.run.reference._model is not forced.policy
    assert torch.equal(
        run.run.reference.score(run.run.probe).token_logps, forced.run.reference.score(forced.run.probe).token_logps
    )


@pytest.fixture
def other(tmp_path):
    policy(seed=1).save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_another_model_has_a_dtype_and_an_attention_of_its_own(other, tmp_path):
    options = {"dtype": "bfloat16", "attn_implementation": "eager", "device_map": "cpu"}
    run = trainer(tmp_path / "run", policy(), ref_model=other, ref_model_init_kwargs=options)
    model = run.run.reference._model
    assert run.run.reference.identity.dtype == "bfloat16"
    assert model.config._attn_implementation == "tether_tree_eager"
    assert {parameter.dtype for parameter in run.policy.parameters()} == {torch.float32}
    expected = alone(run, policy(seed=1).to(torch.bfloat16))
    torch.testing.assert_close(run.run.reference.score(run.run.probe).token_logps, expected, atol=0.3, rtol=0)
    run.train()


def test_another_tokenizer_is_refused_before_training(other, tmp_path):
    """INV-11: a reference of the same size that reads the ids as other text."""
    path = tmp_path / "other" / "tokenizer.json"
    state = json.loads(path.read_text())
    words = state["model"]["vocab"]
    first, second = sorted(words, key=words.get)[20:22]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(state))
    with pytest.raises(ReferencePolicyError, match="2 token ids stand for other tokens"):
        trainer(tmp_path / "run", policy(), ref_model=other)


@pytest.mark.parametrize("adapter", [None, lora()], ids=["full", "lora"])
@pytest.mark.sweep(1)
def test_a_moving_reference_resumes_exactly(adapter, tmp_path):
    """INV-7: train(8) equals train(4) and resume(4), with moves at 3 and 6; and the reference really moves."""

    def run(folder, resume=None, **settings):
        one = trainer(
            folder,
            policy(),
            peft_config=adapter,
            max_steps=8,
            save_strategy="steps",
            save_steps=4,
            sync_ref_model=True,
            ref_model_sync_steps=3,
            ref_model_mixup_alpha=0.5,
            reference_check_steps=1,
            **settings,
        )
        start = one.run.reference.score(one.run.probe).token_logps
        one.train(resume_from_checkpoint=resume)
        return one, start

    whole, start = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed, _ = run(tmp_path / "resumed", resume=str(checkpoint))
    assert losses(resumed) == losses(whole)
    values = whole.run.reference.score(whole.run.probe).token_logps
    assert torch.equal(resumed.run.reference.score(resumed.run.probe).token_logps, values)
    assert (values - start).abs().max() > 1e-3
    # One move at step 3: half of the policy then. The saved policy is one step further.
    assert load_file(checkpoint / "reference.safetensors").keys() == whole.run.reference.state().keys()
    still = trainer(tmp_path / "still", policy(), peft_config=adapter, max_steps=8)
    with pytest.raises(ReferencePolicyError, match="another reference"):
        still.train(resume_from_checkpoint=str(checkpoint))


def test_an_adapter_reference_resumes_exactly(sft, tmp_path):
    """INV-7, 8, 38: the reference's adapter is neither trained nor changed by saving and loading."""
    folder, _ = sft

    def run(where, resume=None):
        one = trainer(
            where,
            policy(),
            peft_config=lora(),
            reference_adapter=str(folder),
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )
        one.train(resume_from_checkpoint=resume)
        return one

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for (name, mine), (_, theirs) in zip(
        whole.policy.named_parameters(), resumed.policy.named_parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    whole.save_model(str(tmp_path / "saved"))
    reloaded = PeftModel.from_pretrained(policy(), tmp_path / "saved")
    torch.testing.assert_close(alone(whole, reloaded), alone(whole, whole.policy), atol=1e-5, rtol=0)


def test_a_run_may_be_resumed_under_another_means(tmp_path):
    """INV-8: the same start by adapter_off and by snapshot is one reference."""
    first = trainer(tmp_path, policy(), peft_config=lora(), max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    second = trainer(tmp_path / "two", policy(), peft_config=lora(), reference_method="snapshot", max_steps=3)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    one, two = first.run.reference, second.run.reference
    assert (one.identity.method, two.identity.method) == ("adapter_off", "snapshot")
    found = [one.score(first.run.probe), two.score(second.run.probe)]
    torch.testing.assert_close(*[scores.token_logps for scores in found], atol=SAME, rtol=0)


def test_an_objective_without_reference_loads_and_runs_none(tmp_path, monkeypatch):
    """INV-9: one scoring call per step; and a reference that is declared all the same is an error."""
    calls = []
    original = Algorithm.scoring

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(Algorithm, "scoring", staticmethod(counting))
    run = trainer(tmp_path, policy(), loss_type="simpo", beta=2.0, max_steps=2)
    assert run.run.line == "reference: none; no reference is loaded or run"
    calls.clear()
    run.train()
    assert len(calls) == 2
    declared = [{"ref_model": "no/such/model"}, {"reference": "start"}, {"reference_method": "snapshot"}]
    for one in [*declared, {"sync_ref_model": True}]:
        with pytest.raises(ConfigError, match=r"compares with no reference|compares with a reference|can move"):
            trainer(tmp_path, policy(), loss_type="simpo", beta=2.0, **one)
    with pytest.raises(ConfigError, match="ref_model was given, and loss simpo compares with no reference"):
        trainer(tmp_path, policy(), loss_type="simpo", beta=2.0, ref_model="no/such/model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reference_adapter": "nowhere"}, "neither an adapter that is loaded"),
        ({"reference": "adapter"}, "no reference_adapter was given"),
        ({"reference": "base", "reference_adapter": "sft"}, "say different things"),
        ({"ref_model_mixup_alpha": 0.3}, "was given without sync_ref_model"),
        ({"sync_ref_model": True, "reference": "base"}, "What can move is a snapshot"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 0, "reference": "start"}, "it must be a whole number from 1"),
        ({"reference_snapshot": "disk"}, "None, device, host"),
        ({"reference_snapshot": "host", "reference": "start", "reference_method": "adapter_off"}, "keeps no snapshot"),
        ({"ref_model_init_kwargs": {"dtype": "float32"}}, "was given without a ref_model"),
        ({"ref_model_init_kwargs": "[1]"}, "ref_model_init_kwargs is '\\[1\\]'; it must be a JSON object"),
        ({"reference_remote": {"adress": "http://x"}}, "its keys may be url, model"),
        ({"reference_remote": {"url": "host:80"}}, "begin with http"),
        ({"reference_method": "remote"}, "belong together"),
        ({"ref_model": "some/model", "reference_remote": {"url": "http://x"}}, "no second model is needed"),
        ({"reference_remote": {"url": "http://x"}, "sync_ref_model": True}, "What can move is a snapshot"),
    ],
)
def test_reference_options_that_cannot_be_honoured(arguments, words, tmp_path, monkeypatch):
    """INV-24."""
    import tether.training.setup.reference as setup

    monkeypatch.setattr(setup, "_load_reference", lambda *_: policy(seed=1))
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path, policy(), **arguments)


def test_margins_that_stay_zero_stop_the_run():
    """INV-28: the policy is its own reference, or nothing trains."""
    args, state = TrainingArguments(use_cpu=True), TrainerState()
    run = SimpleNamespace(proof=TrainingProof(policy()), algorithm=SimpleNamespace(still_steps=False, args=args))
    guard = GuardCallback(run, lambda _: None, 1, lambda _: None)
    for margin in (*[0.0] * 19, 1e-9, *[0.0] * 19):
        guard.on_log(args, state, TrainerControl(), logs={"loss": 0.69, "rewards/margins": margin})
    with pytest.raises(TetherError, match="exactly 0 in 20 logs"):
        guard.on_log(args, state, TrainerControl(), logs={"loss": 0.69, "rewards/margins": 0.0})


@pytest.mark.sweep(1)
@pytest.mark.parametrize("meaning", ["model", "start"])
def test_a_run_against_a_served_reference_is_the_run_against_the_model(meaning, tmp_path):
    """The same losses and weights as with the model in memory, to the server's rounding; nothing else is loaded."""
    reference = policy(seed=1) if meaning == "model" else policy()
    with serving(reference, "sft") as server:
        remote = {"url": server.url, "model": "sft"}
        run = trainer(
            tmp_path / "remote", policy(), optim="sgd", reference=meaning, reference_remote=remote, max_steps=3
        )
        assert run.run.reference.identity.method == "remote"
        run.train()
    other = {"ref_model": policy(seed=1)} if meaning == "model" else {}
    local = trainer(tmp_path / "local", policy(), optim="sgd", max_steps=3, **other)
    local.train()
    assert losses(run) == pytest.approx(losses(local), abs=1e-5)
    for mine, theirs in zip(run.policy.parameters(), local.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
