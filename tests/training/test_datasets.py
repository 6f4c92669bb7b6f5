"""The data sets of a run: sources and splits of a run file reach the trainer prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tether.data import Prepared
from tether.training import DPOConfig
from tether.training.setup.data import RunData, cache_folder
from tiny import pair_rows, tiny_tokenizer


def as_it_is(prepared: Prepared) -> Prepared:
    """What a trainer without an order of its own does to prepared rows."""
    return prepared


def prepared(train: Any, evaluation: Any, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    data = RunData(tiny_tokenizer(), DPOConfig(output_dir=str(folder), report_to=[]), as_it_is)
    source, held = data.prepare_all(train, evaluation)
    return source.known, held, data.reports


def test_a_share_of_the_training_rows_is_set_aside(tmp_path: Path) -> None:
    train, held, reports = prepared(pair_rows(40), {"split": 0.3}, tmp_path)
    assert len(train) + len(held) == 40
    assert reports["eval"]["overlap"] == {"rows": 0, "prompts": 0, "train_rows": len(train)}


def test_sources_may_be_mappings(tmp_path: Path) -> None:
    rows = [{"question": row.pop("prompt"), **row} for row in pair_rows(6)]
    source = {"path": rows, "format": "chatml.intel"}
    train, held, reports = prepared([source, {**source, "weight": 2}], {"a": source, "b": [source]}, tmp_path)
    assert len(train) == 18
    assert {name: len(part) for name, part in held.items()} == {"a": 6, "b": 6}
    assert reports["train"]["form"] == "conversational"
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == tiny_tokenizer().chat_template
    assert reports["train"]["audit"]["duplicates"] == pytest.approx(12 / 18)


def test_kinds_reach_sources_and_splits(tmp_path: Path) -> None:
    class Unpaired(DPOConfig):
        kind = "unpaired"

    rows = [{"question": row["prompt"], "completion": row["chosen"], "label": True} for row in pair_rows(20)]
    source = {"path": rows, "format": "chatml.intel"}
    data = RunData(tiny_tokenizer(), Unpaired(output_dir=str(tmp_path), report_to=[]), as_it_is)
    given, held = data.prepare_all(source, {"split": 5})
    train = given.known
    assert len(train) + len(held) == 20
    assert set(train["label"]) == {1.0}


def test_where_prepared_rows_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "prepared"
    assert cache_folder("~/x") == Path.home() / "x"
    assert cache_folder(None) is None


@pytest.mark.parametrize("said", ["auto", None])
def test_a_run_keeps_what_it_prepared_unless_told_not_to(said, monkeypatch, tmp_path):
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path / "cache"))
    sets = []
    for learning_rate in (1e-6, 1e-3):
        args = DPOConfig(
            output_dir=str(tmp_path / str(learning_rate)), dataset_cache=said, use_cpu=True, learning_rate=learning_rate
        )
        data = RunData(tiny_tokenizer(), args, as_it_is)
        sets.append(data.prepare_all(pair_rows(12), pair_rows(3))[0].known)
        assert data.reports["eval"]["overlap"]["rows"] == 3
    assert sets[0][:] == sets[1][:]
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == (2 if said else 0)
