"""The report's completions: which groups are shown, and that their text stays text."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tether.errors import ConfigError
from tether.report import write_report
from tether.report.sections.completions import read_completions


def written(folder, step, rewards, extra=(), text="said"):
    (folder / "completions").mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, "reward": 0.1}) + "\n")
    count = len(rewards)
    table = pa.table(
        {
            "step": [step] * count,
            "prompt": [f"prompt {k // 2} {text}" for k in range(count)],
            "completion": [f"completion {k} {text}" for k in range(count)],
            "f": rewards,
            "advantage": [0.5, -0.5] * (count // 2),
        }
    )
    about = {"rewards": json.dumps(["f"]), "group": "2"}
    path = folder / "completions" / f"completions_{step:05d}.parquet"
    parquet.write_table(table.replace_schema_metadata(about), path)


def test_the_last_table_gives_the_best_worst_and_widest_groups(tmp_path):
    written(tmp_path, 99999, [0.0, 0.0])
    written(tmp_path, 100000, [1.0, 1.0, 0.5, 0.5, 0.9, 0.2, None, 0.1])
    found = read_completions(tmp_path)
    shown = [(said, [row["completion"] for row in rows]) for said, rows in found.groups()]
    assert shown == [
        ("highest reward", ["completion 0 said", "completion 1 said"]),
        ("lowest reward", ["completion 6 said", "completion 7 said"]),
        ("rewards furthest apart", ["completion 4 said", "completion 5 said"]),
    ]
    page = write_report(tmp_path).read_text()
    assert "step 100000" in page
    assert "completion 4 said" in page
    assert "completion 2 said" not in page


def test_text_stays_text_and_one_group_comes_once(tmp_path):
    written(tmp_path, 1, [0.25, 1.0], text="<script>alert(1)</script>")
    page = write_report(tmp_path).read_text()
    assert page.count("<script>") == 1, "the page's own"
    assert "completion 1 &lt;script&gt;" in page
    assert "highest reward, lowest reward, rewards furthest apart" in page


def test_without_a_table_there_is_no_section_and_a_broken_one_is_named(tmp_path):
    written(tmp_path, 1, [0.25, 1.0])
    path = tmp_path / "completions" / "completions_00001.parquet"
    assert ">Completions<" in write_report(tmp_path).read_text()
    path.write_bytes(b"broken")
    with pytest.raises(ConfigError, match="is not a table of completions that Tether wrote"):
        write_report(tmp_path)
    path.unlink()
    assert ">Completions<" not in write_report(tmp_path).read_text()
