"""`tether precompute --ray N`: workers of Ray Data fill a store, and nothing is lost or doubled when one is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tether.cli.precompute import pool

Command = Callable[..., tuple[int, str, str]]


def stored(folder: str) -> dict[bytes, np.ndarray]:
    """Every key of a store and its values; each is there once."""
    rows: list[tuple[bytes, np.ndarray]] = []
    for part in Path(folder).rglob("*.arrow"):
        table = pa.ipc.open_file(part).read_all()
        values = [np.array(one, np.float32) for one in table["token_logps"].to_pylist()]
        rows += zip(table["key"].to_pylist(), values, strict=True)
    twice = [key for key, times in Counter(key for key, _ in rows).items() if times > 1]
    assert not twice
    return dict(rows)


def test_without_ray_it_says_what_to_install(workplace: Any, tether: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = tether("precompute", "run.yaml", "reference.store=s", "--ray", "2")
    assert code == 2
    assert "pip install 'tether[ray]'" in " ".join(err.split())
    monkeypatch.setenv("RANK", "0")
    code, _, err = tether("precompute", "run.yaml", "reference.store=s", "--ray", "2")
    assert code == 2
    assert "a launcher has started this process" in " ".join(err.split())


@pytest.mark.ray
def test_workers_fill_the_store_of_one_process_though_one_is_killed_and_one_is_slow(
    workplace: Any, tether: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.lost_worker import Failing

    # Rows that repeat are the business of whoever comes second: two workers may compute one at once, and one is read.
    workplace.write_rows(workplace.pairs(32)[24:], "held_out.jsonl")
    code, alone, err = tether("precompute", "run.yaml", "reference.store=one")
    assert code == 0, err
    monkeypatch.setattr(pool, "Worker", Failing)
    code, out, err = tether("precompute", "run.yaml", "reference.store=many", "--ray", "2")
    assert code == 0, err
    assert Path("killed").exists()
    expected, found = stored("one"), stored("many")
    assert expected.keys() == found.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, atol=1e-5)
    tries = Counter(int(line.split()[0]) for line in Path("tried.txt").read_text().splitlines())
    assert tries == Counter({**dict.fromkeys(range(16), 1), 2: 2})
    workers = {line.split()[1] for line in Path("tried.txt").read_text().splitlines()}
    assert len(workers) == 3  # two, and the one in place of the lost one
    # What the lost worker had written was found, not computed: the counts are of whole shards.
    assert "\n64 completions: " in f"\n{out}"  # Ray itself says on the same stream that a worker was lost
    assert alone.startswith("64 completions: 0 were in the store, 64 were computed")
    again = tether("precompute", "run.yaml", "reference.store=many")[1]
    assert again.startswith("64 completions: 64 were in the store, 0 were computed")


@pytest.mark.ray
def test_what_is_wrong_with_a_run_is_said_in_the_workers_words(workplace: Any, tether: Command) -> None:
    code, _, err = tether("precompute", "run.yaml", "reference.store=s", "--ray", "1", "model=nowhere")
    assert code == 2
    last = err.strip().splitlines()[-1]  # before it, Ray may speak for itself
    assert last.startswith("Error: ")
    assert "nowhere" in last
    assert "Traceback" not in err
