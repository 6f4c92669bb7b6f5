"""Streamed rows from the run file to the run folder (INV-34, 7)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import streams

Tether = Callable[..., tuple[int, str, str]]
SET = ("train.max_steps=9", "train.train_sampling_strategy=sequential", "train.eval_strategy=epoch")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    streams.small_chunks(monkeypatch)


def losses(workplace: Any, folder: str) -> list[float]:
    lines = (workplace.path / folder / "metrics.jsonl").read_text().splitlines()
    return [log["loss"] for line in lines if "loss" in (log := json.loads(line))]


@pytest.mark.slow
def test_a_run_file_streams_a_glob_as_it_reads_it_whole(workplace: Any, tether: Tether) -> None:
    rows = workplace.pairs()
    rows[13]["rejected"] = rows[13]["chosen"]
    workplace.write_rows(rows[:9], "shard-1.jsonl")
    workplace.write_rows(rows[9:], "shard-2.jsonl")
    given = ("train", "run.yaml", "data.train=shard-*.jsonl", *SET)
    assert tether(*given, "output=whole")[0] == 0
    code, _, err = tether(*given, "output=streamed", "data.streaming=true")
    assert code == 0, err
    assert "train: streamed; of the first 10 rows:" in err
    assert "train (pass 1, up to here): 23 of 24 pairs" in err
    assert losses(workplace, "streamed") == losses(workplace, "whole")
    assert len(losses(workplace, "whole")) == 9

    found = json.loads((workplace.path / "streamed" / "data.json").read_text())
    assert found["train"]["streamed"] == {"pass": 2, "from_kept_row": 0}
    assert found["eval"]["overlap"]["rows"] == 8
    assert (workplace.path / "streamed" / "report.html").is_file()

    before = losses(workplace, "streamed")
    again = workplace.path / "streamed"
    for step in (6, 9):
        folder = again / f"checkpoint-{step}"
        assert json.loads((folder / "stream.json").read_text())["epoch"] == {6: 1, 9: 1}[step]
    code, _, err = tether(*given, "output=streamed", "data.streaming=true", f"--resume={again}/checkpoint-3")
    assert code == 0, err
    assert losses(workplace, "streamed") == before


def test_a_wrong_row_leaves_a_checkpoint_and_its_number(workplace: Any, tether: Tether) -> None:
    rows = workplace.pairs()
    workplace.write_rows([*rows[:20], {**rows[20], "chosen": ["no"]}, *rows[21:]])
    code, out, err = tether("train", "run.yaml", "data.streaming=true", *SET)
    assert code == 2
    assert "row 21" in out + err
    assert "are kept in out/checkpoint-" in (out + err).replace("\n", " ")
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("data.streaming=true",), "`train.max_steps` is -1, and the training rows are streamed"),
        (("data.buffer_size=5",), "`data.buffer_size` is 5, but the rows are not streamed"),
        (("data.streaming=true", "data.buffer_size=0", *SET), "data.buffer_size"),
        (("train.stream_dataset=true",), "`data.streaming`"),
        (("data.streaming=true", *SET, "data.eval={split: 0.1}"), "eval asks for a part of the training rows"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_streamed_is_said(
    changes: tuple[str, ...], message: str, workplace: Any, tether: Tether
) -> None:
    code, out, err = tether("train", "run.yaml", *changes)
    assert code == 2
    assert message in " ".join((out + err).split())
