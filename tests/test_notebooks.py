"""The notebooks of examples/ run from top to bottom, show what they promise, and leave nothing on standard error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from cli.conftest import Workplace

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"
NOTEBOOKS = ("dpo_quickstart.ipynb", "data_and_report.ipynb")
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The code cells of both, run one after the other in one kernel, with a tiny model and a few rows."""
    place = tmp_path_factory.mktemp("notebooks")
    work = Workplace(place)
    for folder in ("imdb", "here"):
        (place / folder).mkdir()
    for source, target in (("pairs.jsonl", "pairs.jsonl"), ("held_out.jsonl", "heldout.jsonl")):
        shutil.move(place / source, place / "imdb" / target)
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in NOTEBOOKS]
    texts = [text.replace(HUB, str(work.path / "model")).replace("max_steps=20", "max_steps=4") for text in texts]
    cells = [cell for text in texts for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    together = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(together, kernel_name="python3", resources={"metadata": {"path": str(place / "here")}}).execute()
    return together.cells


def outputs(executed: list[Any], words: str) -> list[Any]:
    """What the cells that hold these words put out."""
    return [output for cell in executed if words in cell.source for output in cell.outputs]


def test_the_files_are_those_of_the_test_and_hold_no_outputs() -> None:
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(NOTEBOOKS)
    for name in NOTEBOOKS:
        cells = nbformat.read(FOLDER / name, as_version=4).cells
        assert all(not cell.outputs for cell in cells if cell.cell_type == "code")


def test_training_is_one_display_without_control_characters(executed: list[Any]) -> None:
    (shown,) = outputs(executed, "trainer.train();")
    assert shown.output_type == "display_data"
    page = shown.data["text/html"]
    assert "start equality: at most" in page
    assert "eval at step 4  loss" in page
    assert "step 4/4  loss" in page
    assert "saved: runs/notebook: 4 rows scored" in page
    for output in [output for cell in executed for output in cell.outputs]:
        text = str(output.get("text", output.get("data", "")))
        # tqdm says that there are no widgets where ipywidgets is not installed; that is no line of ours.
        assert output.get("name") != "stderr" or "TqdmWarning" in text, output
        assert not {"\x1b", "\r"} & set(text)


def test_they_show_what_they_promise(executed: list[Any]) -> None:
    assert outputs(executed, "print(trainer.run.line)")[-1].text.startswith("reference: start, by adapter_off")
    assert "'eval_rewards/accuracies'" in outputs(executed, "found = trainer.evaluate()")[-1].data["text/plain"]
    assert outputs(executed, "disable_adapter")[-1].text.count("before:") == 2
    assert "step   4  loss" in outputs(executed, "metrics.jsonl")[-1].text
    assert outputs(executed, 'reference["identity"]')[-1].text.startswith("start adapter_off")
    assert all("report.html" in output.data["text/html"] for output in outputs(executed, "IFrame(")[-1:])
