"""Training with a store: what is stored is what the live reference says, and once it is full nothing is run again."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from store_runs import ROWS, TOKENIZER, lora, policy, step_logs, trainer
from tether import DPOConfig, Store
from tether.data import example_from_row
from tether.errors import ConfigError, ReferencePolicyError, StoreError
from tether.reference import Namespace, Reference, StoredReference
from tether.reference.methods.model import ModelReference
from tether.reference.store.tools import describe_store
from tether.scoring import pack
from tether.types import ReferenceIdentity, Scores
from tiny import pair_rows, ragged_examples

EVALUATION = {"near": Dataset.from_list(pair_rows(20)[14:17]), "far": Dataset.from_list(pair_rows(25)[20:])}
ALLOWED = 1e-5  # nats per token between two packings in float32


def stored_and_live(run, rows):
    """Per token: what the store says of rows, and what the live reference says of each alone."""
    stored, live = [], []
    for row in rows:
        batch = pack([example_from_row(row)])
        values = run.run.reference.store.get(batch.keys)
        assert all(value is not None for value in values)
        stored += values
        live.append(run.run.reference.live.score(batch).token_logps.numpy())
    return np.concatenate(stored), np.concatenate(live)


KINDS = {"lora": {"peft_config": lora()}, "full": {}, "pissa": {"peft_config": lora(init_lora_weights="pissa")}}


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("kind", "size"), [("lora", 1), ("full", 5), ("pissa", 3)])
def test_stored_equals_live_for_every_set_and_batch_size(kind, size, tmp_path):
    """INV-12, 15: shuffled reading, an uneven last batch, two evaluation sets, and one that came after training."""
    run = trainer(
        tmp_path,
        reference_store=str(tmp_path / "store"),
        per_device_train_batch_size=size,
        eval_dataset=EVALUATION,
        num_train_epochs=1,
        **copy.deepcopy(KINDS[kind]),
    )
    run.train()
    run.evaluate()
    late = Dataset.from_list(pair_rows(30)[26:])
    run.evaluate(late)
    prepared = run.run.data.prepare("late", late).dataset
    for rows in (run.train_dataset, *run.eval_dataset.values(), prepared):
        found, right = stored_and_live(run, rows)
        np.testing.assert_allclose(found, right, atol=ALLOWED, rtol=0)
        assert (found < -1e-3).any()
    assert describe_store(tmp_path / "store").completions == 2 * (14 + 3 + 5 + 4)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_first_epoch_fills_the_store_and_later_ones_run_no_reference(kind, tmp_path):
    """Counted: 4 batches of the first epoch, none of the next, none at all in a second run; the same losses."""
    arguments = {"num_train_epochs": 2, "reference_check_steps": 0}
    plain = trainer(tmp_path / "plain", **arguments, **copy.deepcopy(KINDS[kind]))
    plain.train()
    counts, losses = [], []
    for name in ("one", "two"):
        run = trainer(
            tmp_path / name, reference_store=str(tmp_path / "store"), **arguments, **copy.deepcopy(KINDS[kind])
        )
        live, calls = run.run.reference.live, []
        scored = live.score
        live.score = lambda batch, scored=scored, calls=calls: calls.append(batch) or scored(batch)
        run.train()
        # The start check and the frozen probe each score the live reference once.
        counts.append((run.run.reference.forwards, run.run.reference.computed, len(calls)))
        losses.append(step_logs(run))
    assert counts == [(4, 28, 6), (0, 0, 2)]
    np.testing.assert_allclose(losses[0], step_logs(plain), atol=1e-6)
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-6)
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-5)


CHANGES = {
    "learning rate, seed, rank and order": (
        {"learning_rate": 0.5, "seed": 7, "data_seed": 3, "peft_config": lora(r=8)},
        list(reversed(ROWS)),
    ),
    "a trained bias": ({"peft_config": lora(bias="all")}, ROWS),
    "full fine-tuning of the same model": ({"peft_config": None}, ROWS),
    "forced method": ({"reference_method": "snapshot", "reference": "start"}, ROWS),
    "a separate copy": ({"reference_method": "model", "reference": "start"}, ROWS),
    "the base": ({"reference": "base"}, ROWS),
}


def test_parts_of_the_rows_fill_what_the_whole_does(tmp_path):
    """As workers take them, one after the other and in any order."""
    whole = trainer(tmp_path / "whole", reference_store=str(tmp_path / "all"), peft_config=lora())
    expected = whole.precompute_reference().computed
    run = trainer(tmp_path / "parts", reference_store=str(tmp_path / "store"), peft_config=lora())
    filled = [run.precompute_reference(part=(part, 3)) for part in (2, 0, 1)]
    assert all(one.present == 0 and 0 < one.computed < expected for one in filled)
    assert sum(one.computed for one in filled) == expected
    assert run.precompute_reference().computed == 0


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.sweep(2)
def test_what_does_not_change_the_number_reuses_every_entry(name, tmp_path):
    """INV-13, across method: the store's key is of the function that the reference computes."""
    trainer(tmp_path / "one", reference_store=str(tmp_path / "store"), peft_config=lora()).precompute_reference()
    arguments, rows = CHANGES[name]
    arguments = {"peft_config": lora(), **arguments}
    run = trainer(tmp_path / "two", rows=rows, reference_store=str(tmp_path / "store"), **copy.deepcopy(arguments))
    assert run.precompute_reference().computed == 0
    run.train()
    assert run.run.reference.forwards == 0


OTHERS = {
    "shorter sequences": ({"max_length": 30}, policy),
    "the other end": ({"max_length": 30, "truncation_mode": "keep_end"}, policy),
    "another model": ({}, lambda: policy(1)),
    "another type of the weights": ({}, lambda: policy().bfloat16()),
    "autocast": ({"bf16": True}, policy),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.sweep(1)
def test_what_changes_the_number_reuses_no_wrong_entry(name, tmp_path):
    """INV-13: the losses are those of a run without a store."""
    arguments, build = OTHERS[name]
    store = str(tmp_path / "store")
    trainer(tmp_path / "one", reference_store=store, peft_config=lora()).precompute_reference()
    if "max_length" in arguments:
        trainer(tmp_path / "long", reference_store=store, peft_config=lora(), max_length=34).precompute_reference()
    settings = {"learning_rate": 1e-3, "num_train_epochs": 1, **arguments}
    plain = trainer(tmp_path / "plain", build(), peft_config=lora(), **settings)
    plain.train()
    run = trainer(tmp_path / "two", build(), reference_store=store, peft_config=lora(), **settings)
    run.train()
    assert run.run.reference.computed > 0
    np.testing.assert_allclose(step_logs(run), step_logs(plain), atol=1e-6)
    if not arguments.get("bf16") and build is policy:
        found, right = stored_and_live(run, run.train_dataset)
        np.testing.assert_allclose(found, right, atol=ALLOWED, rtol=0)


def poison(path, run, rows, by):
    """Put wrong values under right keys, with right checksums, as a program with a fault would."""
    for part in path.rglob("*.arrow"):
        part.unlink()
    stored = run.run.reference
    with Store(path, stored.store.namespace) as store:
        for row in rows:
            batch = pack([example_from_row(row)])
            lengths = torch.bincount(batch.completion_index).tolist()
            store.put(batch.keys, [part.numpy() for part in (stored.live.score(batch).token_logps + by).split(lengths)])


def test_poisoned_entries_are_refused_before_training(tmp_path):
    """INV-14: half a nat is noticed, rounding is not."""
    path = tmp_path / "store"
    run = trainer(tmp_path / "one", reference_store=str(path), peft_config=lora())
    poison(path, run, run.train_dataset, 1e-6)
    trainer(tmp_path / "two", reference_store=str(path), peft_config=lora())
    poison(path, run, run.train_dataset, 0.5)
    with pytest.raises(StoreError, match=r"differs by up to 0\.5 nats and by 0\.5 on average"):
        trainer(tmp_path / "three", reference_store=str(path), peft_config=lora())


def test_poisoned_entries_change_the_loss(tmp_path, monkeypatch):
    """INV-14: the store is really read. The check is switched off to see it."""
    path = tmp_path / "store"
    right = trainer(tmp_path / "one", reference_store=str(path), peft_config=lora(), num_train_epochs=1)
    right.train()
    for part in path.rglob("*.arrow"):
        part.unlink()
    with Store(path, right.run.reference.store.namespace) as store:
        for row in right.train_dataset:
            batch = pack([example_from_row(row)])
            chosen, rejected = right.run.reference.live.score(batch).token_logps.split(
                torch.bincount(batch.completion_index).tolist()
            )
            store.put(batch.keys, [chosen.numpy() - 0.5, rejected.numpy()])
    monkeypatch.setattr("tether.training.trainer.verify_store", lambda *_: None)
    wrong = trainer(tmp_path / "two", reference_store=str(path), peft_config=lora(), num_train_epochs=1)
    wrong.train()
    assert wrong.run.reference.forwards == 0
    assert abs(step_logs(wrong)[0] - step_logs(right)[0]) > 0.01


def test_precompute_as_trl_names_it_fills_before_the_first_step(tmp_path):
    run = trainer(
        tmp_path,
        peft_config=lora(),
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=5,
        eval_dataset=EVALUATION,
        eval_strategy="epoch",
        num_train_epochs=1,
    )
    run.train()
    # 14 rows in passes of 5, and one pass for each evaluation set.
    assert (run.run.reference.forwards, run.run.reference.computed) == (5, 44)
    assert describe_store(tmp_path / "reference_store").completions == 44
    assert step_logs(run)[0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference_store": "x", "reference": "none"}, "nothing to store"),
        ({"precompute_ref_log_probs": True, "reference": "none"}, "nothing to store"),
        ({"precompute_ref_batch_size": 4}, "needs precompute_ref_log_probs"),
        ({"precompute_ref_log_probs": True, "precompute_ref_batch_size": 0}, "is 0"),
        ({"reference_store_dtype": "float16"}, "without a store"),
        ({"reference_store": "x", "reference_store_dtype": "int8"}, "allowed are float32, float16"),
        ({"reference_store": "x", "sync_ref_model": True}, "a moving reference is another one after each move"),
        ({"reference_store": ""}, "is empty"),
    ],
)
def test_options_of_the_store_that_do_nothing_are_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **arguments)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", ["full", "pissa"])
def test_a_resumed_run_with_a_store_equals_an_uninterrupted_one(kind, tmp_path):
    """INV-7, with a store that was half full at the checkpoint; also when the resumed run has none of its own yet."""
    settings = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}

    def run(name, store, resume=None):
        made = trainer(tmp_path / name, reference_store=str(tmp_path / store), **settings, **copy.deepcopy(KINDS[kind]))
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run("whole", "store")
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    for store in ("store", "empty"):
        again = run(f"again-{store}", store, checkpoint)
        ours, theirs = again.policy.state_dict(), whole.policy.state_dict()
        exact = store == "store"
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, atol=0 if exact else 1e-6, rtol=0 if exact else 1e-5)
        assert again.run.reference.identity == whole.run.reference.identity
    assert again.run.reference.store.namespace.fingerprint == whole.run.reference.identity.fingerprint


def test_another_reference_is_refused_on_resuming_with_a_store_too(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "reference_store": str(tmp_path / "store")}
    trainer(tmp_path, peft_config=lora(), **settings).train()
    other = trainer(tmp_path, policy(1), peft_config=lora(), **settings)
    with pytest.raises(ReferencePolicyError, match="Resuming with another reference"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def saved_model(folder, seed=5):
    policy(seed).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_a_second_model_goes_when_the_store_is_full_and_comes_back_for_new_rows(tmp_path, monkeypatch):
    """The weights are dropped after the first epoch, and again loaded for an evaluation on rows that nobody scored."""
    source = saved_model(tmp_path / "reference")
    loaded = []
    real = ModelReference._recalled
    monkeypatch.setattr(ModelReference, "_recalled", lambda self: loaded.append(self.resident) or real(self))
    run = trainer(tmp_path, ref_model=source, reference_store=str(tmp_path / "store"), peft_config=lora())
    live = run.run.reference.live
    assert live.resident
    run.train()
    assert not live.resident
    assert live._model is None
    assert all(loaded)  # nothing was loaded twice during training, and the frozen probe did not ask for it
    late = Dataset.from_list(pair_rows(30)[20:])
    metrics = run.evaluate(late)
    assert loaded[-1] is True or loaded.count(False) == 1
    assert not live.resident
    again = trainer(tmp_path / "plain", run.policy, ref_model=policy(5), num_train_epochs=1)
    assert metrics["eval_loss"] == pytest.approx(again.evaluate(late)["eval_loss"], abs=1e-5)
    # A second run finds everything: the weights serve the checks at the start and are gone before the first step.
    second = trainer(tmp_path / "two", ref_model=source, reference_store=str(tmp_path / "store"), peft_config=lora())
    second.train()
    assert second.run.reference.forwards == 0
    assert not second.run.reference.live.resident


def test_released_weights_that_changed_on_disk_are_refused(tmp_path):
    source = saved_model(tmp_path / "reference")
    run = trainer(tmp_path, ref_model=source, reference_store=str(tmp_path / "store"), peft_config=lora())
    run.train()
    saved_model(tmp_path / "reference", seed=6)
    with pytest.raises(ReferencePolicyError, match="loaded again, and is another one now"):
        run.evaluate(Dataset.from_list(pair_rows(30)[20:]))


def test_a_model_in_memory_is_never_dropped(tmp_path):
    """INV-6: what was passed as an object cannot be loaded again."""
    run = trainer(tmp_path, ref_model=policy(5), reference_store=str(tmp_path / "store"), peft_config=lora())
    run.train()
    assert run.run.reference.live._model is not None
    run.evaluate(Dataset.from_list(pair_rows(30)[20:]))


def test_the_frozen_probe_watches_the_live_reference_behind_a_store(tmp_path):
    """INV-2: a frozen tensor that is edited stops the run although every value comes from the store."""
    from transformers import TrainerCallback

    class Edit(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    kwargs["model"].get_base_model().lm_head.weight.mul_(1.1)

    store = str(tmp_path / "store")
    trainer(tmp_path / "one", reference_store=store, peft_config=lora()).precompute_reference()
    run = trainer(tmp_path, reference_store=store, peft_config=lora(), reference_check_steps=1, callbacks=[Edit()])
    with pytest.raises(ReferencePolicyError, match="The reference moved"):
        run.train()
    assert run.run.reference.forwards == 0


@pytest.mark.slow
def test_float16_values_train_alike_in_the_first_epoch_and_later(tmp_path):
    arguments = {"reference_store": str(tmp_path / "store"), "reference_store_dtype": "float16", "seed": 3}
    first, second = (trainer(tmp_path / name, peft_config=lora(), **arguments) for name in ("one", "two"))
    first.train()
    second.train()
    assert step_logs(first) == step_logs(second)
    found, right = stored_and_live(first, first.train_dataset)
    assert 0 < np.abs(found - right).max() < 0.02


def test_a_store_serves_without_a_trainer(tmp_path):
    """The plain functions: a reference of one's own, and the store on its own."""

    class Counting(Reference):
        calls = 0

        def __init__(self):
            self.identity = ReferenceIdentity("model", "model", "mine", None, "float32", "s2:77")

        def score(self, batch, outputs=()):
            self.calls += 1
            return Scores(-batch.targets.float() / 10, batch.completion_index, batch.num_completions)

    live, examples = Counting(), ragged_examples()
    reference = StoredReference(live, tmp_path, "float32")
    batch = pack(examples)
    for _ in range(2):
        torch.testing.assert_close(reference.score(batch).token_logps, -batch.targets.float() / 10)
    part = pack(examples[1:2])
    torch.testing.assert_close(reference.score(part).token_logps, -part.targets.float() / 10)
    assert live.calls == 1
    reference.settle(release=True)
    assert Store(tmp_path, Namespace("s2:77", "float32")).holds(batch.keys).all()


def test_a_reference_whose_weights_nothing_identifies_is_not_stored(tmp_path):
    """A server says its name and not its weights: the same name may be another model tomorrow."""

    class Served:
        tolerance = 1e-3
        identity = ReferenceIdentity("model", "remote", "a server", None, "served", "served:00ff")

    for fingerprint in ("served:00ff", ""):
        Served.identity = dataclasses.replace(Served.identity, fingerprint=fingerprint)
        with pytest.raises(ConfigError, match="nothing identifies its weights"):
            StoredReference(Served(), tmp_path, "float32")


def test_an_adapter_that_has_learnt_is_part_of_the_fingerprint(tmp_path):
    """Negative control of reuse: a continued adapter is another function, and so is the base under it."""
    store = str(tmp_path / "store")
    trainer(tmp_path / "one", reference_store=store, peft_config=lora()).precompute_reference()
    continued = get_peft_model(policy(), lora())
    with torch.no_grad():
        for name, parameter in continued.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    run = trainer(tmp_path / "two", continued, reference_store=store)
    assert run.precompute_reference().present == 0


def test_that_only_the_precision_keeps_a_run_from_a_store_is_said(tmp_path, caplog):
    """A store filled in bfloat16 is named to a run in float32 with what reads it; another model's is not."""
    store = str(tmp_path / "store")
    trainer(tmp_path / "one", reference_store=store, peft_config=lora(), bf16=True).precompute_reference()
    caplog.clear()
    trainer(tmp_path / "two", reference_store=store, peft_config=lora(), bf16=False)
    (line,) = [line for line in caplog.messages if "very reference" in line]
    assert "in float32 under bfloat16, kept as float32, and none in float32, kept as float32" in line
    assert "Set bf16=True to use them" in line
    caplog.clear()
    half = {"reference_store": store, "reference_store_dtype": "float16"}
    trainer(tmp_path / "half", peft_config=lora(), bf16=False, **half)
    assert "Set bf16=True and reference_store_dtype=float32 to use them" in caplog.text
    caplog.clear()
    trainer(tmp_path / "other", policy(1), reference_store=store, peft_config=lora(), bf16=False)
    trainer(tmp_path / "same", reference_store=store, peft_config=lora(), bf16=True)
    assert "very reference" not in caplog.text
