"""What the README prints is run: its run files, its commands, its Python."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tether.config import load_run_file

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = "data: {train: pairs.jsonl, eval: held_out.jsonl}\noutput: run\n"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, with the model that a workplace has in place of the hub's."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [block.replace(HUB, "model") for block in found]


def commands() -> list[list[str]]:
    """Every line that a reader types after `$ tether`."""
    lines = [line[9:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ tether ")]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_run_file_and_every_command_work(workplace: Any, tether: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("film 3:\n"))  # what is said to `tether chat`
    (run,) = [block for block in blocks("yaml") if block.startswith("# run.yaml")]
    (workplace.path / "run.yaml").write_text(run.replace("1024", "64").replace("batch_size: 32", "batch_size: 8"))
    typed = commands()
    assert ["train", "run.yaml", "--resume"] in typed
    for command in typed:
        code, _, said = tether(*command)
        assert code == 0, said
    assert (workplace.path / "runs" / "second" / "report.html").is_file()
    table = README[README.index("## The run folder") :]
    for name in re.findall(r"^\| `([a-z_.]+)` \|", table, flags=re.MULTILINE):
        assert (workplace.path / "runs" / "first" / name).is_file(), name


@pytest.mark.parametrize("place", range(len(blocks("yaml"))))
def test_every_run_file_is_read(place: int, workplace: Any) -> None:
    text = blocks("yaml")[place]
    (workplace.path / "sft").mkdir()
    text = text.replace("runs/sft", "sft")
    (workplace.path / "run.yaml").write_text(text if "data:" in text else text + DATA)
    assert load_run_file(workplace.path / "run.yaml", []).output


def test_the_python_runs(workplace: Any) -> None:
    from transformers import AutoModelForCausalLM

    space: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained("model"),
        "prompt_ids": [5, 6],
        "chosen_ids": [7, 2],
        "rejected_ids": [8, 9, 2],
    }
    for block in blocks("python"):
        exec(block.replace("per_device_train_batch_size=4", "max_steps=1, use_cpu=True, report_to='none'"), space)
    assert space["trainer"].state.global_step == 1
