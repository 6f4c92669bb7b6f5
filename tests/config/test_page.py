"""docs/run_file.md is what the configuration says, and names every key."""

from __future__ import annotations

from pathlib import Path

from tether.config.keys.page import run_file_page
from tether.config.run import RunConfig, Train


def test_the_page_is_what_the_configuration_says():
    page = Path(__file__).parents[2] / "docs" / "run_file.md"
    assert page.read_text(encoding="utf-8") == run_file_page() + "\n"


def test_the_page_has_a_row_for_keys_of_every_kind():
    rows = {line.split("`")[1] for line in run_file_page().splitlines() if line.startswith("| `")}
    assert {*RunConfig.model_fields, *Train.model_fields} <= rows
    assert {"eval_steps", "warmup_steps", "report_to", "cpu_matmul", "beta", "group", "steps", "url"} <= rows
    assert "not_a_key" not in rows


def test_every_row_says_what_its_key_does_and_what_may_stand_there():
    rows = [line.strip("| ").split(" | ") for line in run_file_page().splitlines() if line.startswith("| `")]
    assert [cells[0] for cells in rows if len(cells) < 4 or not cells[3].strip(" |")] == []
    assert [cells[0] for cells in rows if "only a script" in cells[1]] == []
