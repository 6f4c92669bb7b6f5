"""docs/data.md: every example on the page is run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tether.config import build, check_run
from tether.data import load_rows, preferences, prepare, read_preferences
from tether.data.audit.audit import FINDINGS
from tether.data.rows.formats import FORMATS
from tether.data.text.truncate import TRUNCATION_MODES

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```json (\S+) (\S+)\n(.+)\n(.+)\n```$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "kind", "row", "becomes"), BLOCKS, ids=[f"{b[0]}-{b[1]}-{n}" for n, b in enumerate(BLOCKS)]
)
def test_an_example_of_the_page(name: str, kind: Any, row: str, becomes: str) -> None:
    source: Any = [json.loads(row)] if name == "trl" else {"path": [json.loads(row)], "format": name}
    data = load_rows(source, kind=kind)
    [record] = preferences(data, read_preferences(data, kind=kind))
    expected = json.loads(becomes)
    if name == "trl":
        assert {"prompt": record.prompt, "completions": list(record.completions)} == expected
    else:
        assert {column: data[0][column] for column in expected} == expected


def test_the_rows_with_images_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a row for a processor, with as many images as it names and nothing left out."""
    from tiny_vision import picture, tiny_processor

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.png", "b.png")):
        picture(seed).save(name)
    [block] = re.findall(r"^```json images\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
    rows = [json.loads(line) for line in block.splitlines()]
    assert len(rows) == 3
    for row in rows:
        prepared = prepare([row], tiny_processor("llava"), max_length=None)
        pixels = prepared.dataset[0]["image_inputs"].tensors["pixel_values"]
        assert len(pixels) == len(row.get("images", ["one"]))
        assert prepared.report.unused_columns == ()


def test_every_format_is_on_the_page() -> None:
    families = {name.partition(".")[2] for name, *_ in BLOCKS} | {name for name, *_ in BLOCKS}
    assert {name for name in FORMATS if name not in families and name.partition(".")[2] not in families} == set()
    assert len(BLOCKS) > 25
    for mode in TRUNCATION_MODES:
        assert f"`{mode}`" in PAGE


def test_the_run_files_of_the_page_are_right() -> None:
    blocks = [yaml.safe_load(one) for one in re.findall(r"^```yaml\n(.*?)```$", PAGE, re.MULTILINE | re.DOTALL)]
    checked, streamed = (check_run({"model": "m", "train": {"use_cpu": True}, **block}) for block in blocks)
    assert checked.data.check is not None
    assert set(checked.data.check) <= set(FINDINGS)
    arguments, _, keywords = build(streamed)
    assert (arguments.stream_dataset, arguments.dataset_buffer_size, arguments.max_steps) == (True, 10000, 5000)
    assert keywords["train_dataset"] == {"path": "shards/*.parquet"}
