"""A full snapshot leaves memory once nothing needs it, and comes back bit for bit or not at all."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import weakref

import pytest
import torch

from policies import PROBE, take_steps, with_lora
from store_runs import lora, policy, step_logs, trainer
from tether.errors import ReferencePolicyError
from tether.models.structure import trainable_tensors
from tether.reference import ReferenceSpec, resolve
from tether.reference.methods.spill import Spill
from tether.scoring import score
from tiny import pair_rows, tiny_model


def snapshot(model, folder):
    return resolve(ReferenceSpec(spill=folder), model, PROBE, score, lambda other: score).reference


def watched(reference):
    """Weak references to the storages of a snapshot's values."""
    return [weakref.ref(tensor.untyped_storage()) for tensor in reference._start.values()]


def alive(storages) -> int:
    gc.collect()
    return sum(storage() is not None for storage in storages)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_is_given_back_and_the_values_return_bit_for_bit(dtype, tmp_path):
    """INV-2: counted by storages; three times round, with updates of the policy between."""
    model = tiny_model().to(dtype)
    reference = snapshot(model, tmp_path)
    storages, values = watched(reference), {name: value.clone() for name, value in reference.state().items()}
    expected = reference.score(PROBE).token_logps
    assert alive(storages) == len(storages)
    for _ in range(3):
        reference.release()
        assert (alive(storages), reference.resident) == (0, False)
        take_steps(model, 1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert torch.equal(reference.score(PROBE).token_logps, expected)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(torch.equal(values[name], value) for name, value in reference.state().items())
        storages = watched(reference)
    assert os.listdir(tmp_path) == [], "the file has no name, so that a killed run leaves nothing behind"


def test_a_released_snapshot_gives_its_values_to_a_checkpoint_and_takes_others(tmp_path):
    reference = snapshot(tiny_model(), tmp_path)
    start = {name: value.clone() for name, value in reference.state().items()}
    reference.release()
    assert all(torch.equal(start[name], value) for name, value in reference.state().items())
    reference.release()
    other = {name: 2 * value for name, value in start.items()}
    reference.load_state(other)
    reference.release()
    assert not reference.resident
    assert all(torch.equal(other[name], value) for name, value in reference.state().items()), "what was loaded returns"


def test_a_small_snapshot_and_a_moving_one_stay(tmp_path):
    small = resolve(
        ReferenceSpec(method="snapshot", spill=tmp_path), with_lora(), PROBE, score, lambda other: score
    ).reference
    full = snapshot(tiny_model(), tmp_path)
    kept_in_memory = resolve(ReferenceSpec(), tiny_model(), PROBE, score, lambda other: score).reference
    assert (small.may_release, full.may_release, kept_in_memory.may_release) == (False, True, False)
    small.release()
    kept_in_memory.release()
    assert small.resident
    assert kept_in_memory.resident


@pytest.mark.parametrize("obstacle", ["full", "refused"])
def test_where_the_disk_refuses_the_snapshot_stays_and_that_is_said(obstacle, tmp_path, monkeypatch, caplog):
    """What cannot come back is not let go."""
    reference = snapshot(tiny_model(), tmp_path / "file" / "below")
    if obstacle == "full":
        usage = shutil._ntuple_diskusage(1, 1, 10)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    else:
        (tmp_path / "file").write_text("in the way")
    expected = reference.score(PROBE).token_logps
    with caplog.at_level(logging.WARNING, "tether"):
        reference.release()
    assert "the snapshot stays in memory although the store is full" in caplog.text
    assert reference.resident
    assert not reference.may_release
    assert torch.equal(reference.score(PROBE).token_logps, expected)


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_values_that_changed_on_disk_are_refused(damage, tmp_path):
    """Negative control of the fingerprint: one bit, a shorter file, no file."""
    model = tiny_model()
    reference = snapshot(model, tmp_path)
    reference.release()
    file = reference._spill._file
    if damage == "changed":
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    elif damage == "cut":
        file.truncate(500)
    else:
        reference._spill.forget()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ReferencePolicyError, match=r"was on disk in .* and cannot come back"):
        reference.score(PROBE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_tensors_of_every_shape_and_type_come_back(tmp_path):
    tensors = {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "half": torch.randn(7).half(),
        "whole": torch.arange(5),
    }
    spill = Spill(tmp_path)
    left = spill.write(tensors)
    assert all(value.is_meta for value in left.values())
    for name, value in spill.read().items():
        assert value.dtype == tensors[name].dtype
        assert torch.equal(value, tensors[name])


@pytest.mark.slow
def test_a_full_store_sends_the_snapshot_away_and_new_rows_bring_it_back(tmp_path):
    """Full fine-tuning: the losses are those of a run without a store, and so is an evaluation on new rows."""
    plain = trainer(tmp_path / "plain")
    plain.train()
    late = pair_rows(30)[20:]
    expected = plain.evaluate(late)
    run = trainer(tmp_path / "run", reference_store=str(tmp_path / "store"))
    live = run.run.reference.live
    storages = watched(live)
    run.train()
    assert (alive(storages), live.resident) == (0, False)
    assert step_logs(run) == pytest.approx(step_logs(plain), abs=1e-6)
    assert run.evaluate(late)["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert not live.resident, "the new rows are stored, and the values are away again"
    # A second run finds a full store: the snapshot goes before the first step, and the start is not read again.
    second = trainer(tmp_path / "two", reference_store=str(tmp_path / "store"))
    gone = []
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            gone.append(not second.run.reference.live.resident)

    second.add_callback(Watch())
    second.train()
    assert gone
    assert all(gone)
    assert second.run.reference.forwards == 0
    assert set(trainable_tensors(policy())) == second.run.reference.live._start.keys()


def test_the_snapshot_of_an_adapter_stays_in_memory(tmp_path):
    run = trainer(
        tmp_path / "run", reference_store=str(tmp_path / "store"), peft_config=lora(), reference_method="snapshot"
    )
    run.train()
    assert run.run.reference.live.resident
