"""What the README prints is run: its run files, its commands, its Python."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tether.config import load_run_file

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
START = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Files of other tools, as a reader has them.
THEIRS = {
    "axolotl.yaml": "base_model: model\nrl: dpo\ndatasets: [{path: pairs.jsonl, ds_type: json, split: train}]\n"
    "adapter: lora\nlora_r: 4\nlora_alpha: 8\nlora_target_linear: true\nsequence_len: 64\nmicro_batch_size: 4\n"
    "gradient_accumulation_steps: 2\nmax_steps: 1\nlearning_rate: 1e-4\noutput_dir: runs/axolotl\n",
    "trl.yaml": "model_name_or_path: model\ndataset_name: pairs.jsonl\nmax_steps: 1\noutput_dir: runs/trl\n"
    "report_to: none\n",
}


def blocks(language: str, page: str = README) -> list[str]:
    """The fenced blocks of a language, with the model that a workplace has in place of the hub's."""
    found = re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    return [block.replace(HUB, "model") for block in found]


def commands(page: str = README) -> list[list[str]]:
    """Every line that a reader types after `$ tether`."""
    typed = [line for block in blocks("console", page) for line in block.splitlines()]
    return [shlex.split(line[9:], comments=True) for line in typed if line.startswith("$ tether ")]


def promised_files() -> list[str]:
    """What the README's table says that a run folder holds."""
    table = README[README.index("## The run folder") :]
    return re.findall(r"^\| `([a-z_.]+)` \|", table, flags=re.MULTILINE)


def test_the_run_file_and_every_command_work(workplace: Any, tether: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("film 3:\n"))  # what is said to `tether chat`
    (run,) = [block for block in blocks("yaml") if block.startswith("# run.yaml")]
    (workplace.path / "run.yaml").write_text(run.replace("1024", "64").replace("batch_size: 32", "batch_size: 8"))
    for name, text in THEIRS.items():
        (workplace.path / name).write_text(text)
    typed = commands()
    assert ["train", "run.yaml", "--resume"] in typed
    assert all(any(name in command for command in typed) for name in THEIRS)
    for command in typed:
        code, _, said = tether(*command)
        assert code == 0, said
    for run in ("second", "axolotl", "trl"):
        assert (workplace.path / "runs" / run / "report.html").is_file()
    for name in promised_files():
        assert (workplace.path / "runs" / "first" / name).is_file(), name


def test_the_ten_minute_start_works(workplace: Any, tether: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("film 3:\n"))
    (workplace.path / "run.yaml").unlink()
    (workplace.path / "examples" / "imdb").mkdir(parents=True)
    workplace.write_rows(workplace.pairs(), "examples/imdb/pairs.jsonl")
    workplace.write_rows(
        [{**row, "prompt": "a " + row["prompt"]} for row in workplace.pairs(8)], "examples/imdb/heldout.jsonl"
    )
    typed = commands(START)
    for command in typed:
        code, _, said = tether(*command)
        assert code == 0, said
    assert [command[0] for command in typed] == [
        *("doctor", "data", "data", "init", "plan", "train", "report", "eval", "compare", "chat", "export", "merge")
    ]
    assert (workplace.path / "side_by_side.html").is_file()
    for block in blocks("python", START):
        exec(block, {})


FAQ = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")


def inline_run_files() -> list[str]:
    """The parts of run files in the text of the questions, such as `reference: {store: log_probs}`."""
    plain = re.sub(r"^```.*?^```", "", FAQ, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"`((?:model|reference|objective|train|rewards): [{\[].*?[}\]])`", plain)
    return [one.replace("…", "keep_end" if "truncation" in one else "model").replace("NAME", "model") for one in found]


@pytest.mark.parametrize("text", [*blocks("yaml"), *blocks("yaml", FAQ), *inline_run_files()])
def test_every_run_file_is_read(text: str, workplace: Any) -> None:
    (workplace.path / "sft").mkdir()
    text = text.replace("runs/sft", "sft")
    for key, value in {"model": "model", "data": "{train: pairs.jsonl, eval: held_out.jsonl}", "output": "run"}.items():
        text += "" if re.search(rf"^{key}:", text, re.MULTILINE) else f"\n{key}: {value}"
    if "rewards:" in text:
        text += "\nobjective: {loss: dapo}"
    (workplace.path / "run.yaml").write_text(text)
    assert load_run_file(workplace.path / "run.yaml", []).output


def test_the_python_runs_and_leaves_what_the_table_promises(workplace: Any, tether: Any) -> None:
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
    folder = workplace.path / "runs" / "first"
    for name in (*promised_files(), "adapter_model.safetensors"):
        assert (folder / name).is_file(), name
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "LoRA, r 16" in page
    assert "sigmoid, β 0.1" in page
    logged = space["trainer"].evaluate(str(workplace.path / "held_out.jsonl"))
    code, answer, said = tether("eval", "runs/first", "--data", "held_out.jsonl", "--json")
    assert code == 0, said
    found = json.loads(answer)
    # Rewards need beta, which only the configuration that the run left can say.
    assert found["overall"]["margin"][0] == pytest.approx(logged["eval_rewards/margins"], abs=1e-5)
