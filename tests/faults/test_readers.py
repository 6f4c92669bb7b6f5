"""Whoever reads a run folder or a store while it is written sees it as it was or as it is, never half."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import yaml

from tether.files import put_in_place, write_whole
from tether.reference.store.parts import Namespace
from tether.reference.store.store import Store
from tether.training.saving.atomic_checkpoint import MANIFEST, damage, finish

_TIMES = 200


def _write_files(folder: Path, begun) -> None:
    begun.set()
    for number in range(_TIMES):
        write_whole(folder / "config.yaml", yaml.safe_dump({"number": number, "rest": ["x" * 50] * 200}))


def _write_checkpoints(folder: Path, begun) -> None:
    begun.set()
    for number in range(_TIMES):
        written = folder / ".writing" / "checkpoint-2"
        written.mkdir(parents=True)
        (written / "weights").write_bytes(bytes([number % 256]) * 50_000)
        finish(written, folder / "checkpoint-2")


def _write_store(folder: Path, begun) -> None:
    with Store(folder, Namespace("s2:00", "float32"), flush_bytes=64) as store:
        begun.set()
        for number in range(_TIMES):
            store.put([number.to_bytes(16, "big")], [np.full(3, -number, dtype=np.float32)])


def _beside(write, folder: Path):
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=write, args=(folder, begun))
    process.start()
    assert begun.wait(60)
    return process


@pytest.mark.faults
def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    write_whole(tmp_path / "config.yaml", "number: -1\nrest: []\n")
    process, seen = _beside(_write_files, tmp_path), set()
    while process.is_alive():
        read = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert len(read["rest"]) in (0, 200)
        seen.add(read["number"])
    process.join()
    assert process.exitcode == 0
    assert len(seen) > 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.faults
def test_a_checkpoint_that_is_written_over_is_there_at_every_instant(tmp_path):
    process, seen = _beside(_write_checkpoints, tmp_path), 0
    place = tmp_path / "checkpoint-2"
    while process.is_alive():
        if seen or place.exists():
            assert (place / MANIFEST).is_file()
            seen += 1
    process.join()
    assert process.exitcode == 0
    assert seen > 2
    assert damage(place) == ""


@pytest.mark.faults
def test_a_store_that_grows_gives_whole_values(tmp_path):
    process = _beside(_write_store, tmp_path / "store")
    store, seen = Store(tmp_path / "store", Namespace("s2:00", "float32")), 0
    keys = [number.to_bytes(16, "big") for number in range(_TIMES)]
    while process.is_alive() or seen < _TIMES:
        store.refresh()
        found = store.get(keys)
        assert all(value is None or value.tolist() == [-n] * 3 for n, value in enumerate(found))
        assert sum(value is not None for value in found) >= seen
        seen = sum(value is not None for value in found)
    process.join()
    assert process.exitcode == 0
    assert not store.damaged


def test_a_folder_takes_the_place_of_another(tmp_path):
    """Also where the system cannot exchange two names in one operation."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "said.json").write_text(json.dumps(name))
    put_in_place(tmp_path / "new", tmp_path / "old")
    assert json.loads((tmp_path / "old" / "said.json").read_text()) == "new"
    assert json.loads((tmp_path / "new" / "said.json").read_text()) == "old"


def test_without_an_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr("tether.files._exchanged", lambda one, other: False)
    test_a_folder_takes_the_place_of_another(tmp_path)
